"""Teaching a pretrained model the old task, so that it has a circuit for it that fine-tuning can keep or lose.

Cross-entropy at the answer over all weights, with TRL's SFTTrainer as in the supervised arms. A part of the target
probability may be spread over the wrong objects of the context (`spread`), so that the model is not saturated. Ends at
the first check at which the selection prompts are answered to the level.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from stages.learning import supervised
from stages.learning.knowledge import old_scores
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.run import Run, Watcher
from stages.learning.schedule import prompt_order
from stages.learning.settings import CurveRow, Training
from stages.pipeline.stage import Invalid

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from stages.tasks.examples import Examples, Prompts


Report = Callable[[int, CurveRow], None]  # called with a step and the last check


@runtime_checkable
class Settings(Protocol):
    """Section `teach` of params.yaml."""

    level: float
    most_steps: int
    prompts_per_step: int
    learning_rate: float
    warmup_steps: int
    spread: float
    check_every: int
    check_prompts: int
    weight_decay: float
    clip: float


class _Checks(Watcher):
    """Scores the model every so many steps, and says when it is enough.

    Attributes:
        rows: one a check: step, accuracy and p_correct.
    """

    def __init__(self, model: Any, examples: "Examples", settings: Settings, report: Report) -> None:
        self.rows: list[CurveRow] = []
        self._model, self._examples, self._settings, self._report = model, examples, settings, report
        self.add(0)

    @property
    def enough(self) -> bool:
        return self.rows[-1]["accuracy"] >= self._settings.level

    def add(self, step: int) -> None:
        training = self._model.training
        found = old_scores(self._model.eval(), self._examples.input_ids, self._examples.answer)
        self._model.train(training)
        self.rows.append({"step": step, **found})

    def after(self, step: int, completions: int) -> bool:
        if step % self._settings.check_every == 0 or step == self._settings.most_steps:
            self.add(step)
        self._report(step, self.rows[-1])
        return self.rows[-1]["step"] == step and self.enough


def teach(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    train: "Prompts",
    examples: "Examples",
    settings: Settings,
    seed: int,
    report: Report,
) -> list[CurveRow]:
    """Train the model in place.

    Args:
        train: prompts of the old task, as of a new one.
        examples: of the selection split; the first `check_prompts` are scored.
        seed: says which prompts are used when.
        report: called with every step and the last check.

    Returns:
        the checks, the untaught model first.

    Raises:
        Invalid: the level was not reached.
    """
    training = Training(
        steps=settings.most_steps,
        prompts_per_step=settings.prompts_per_step,
        dense_until=settings.most_steps,
        dense_every=settings.check_every,
        sparse_checkpoints=0,
        probe_examples=settings.check_prompts,
        betas=(0.9, 0.999),
        epsilon=1e-8,
        weight_decay=settings.weight_decay,
        clip=settings.clip,
        warmup_steps=settings.warmup_steps,
        seed=seed,
    )
    examples = examples.select(torch.arange(min(len(examples), settings.check_prompts)))
    checks = _Checks(model, examples, settings, report)
    if checks.enough:
        return checks.rows
    run = Run(
        arm="teach",
        seed=seed,
        learning_rate=settings.learning_rate,
        training=training,
        section=settings,
        model=model,
        tokenizer=tokenizer,
        train=train,
        rehearsal=train,
        order=prompt_order(len(train), training, seed),
        watcher=checks,
    )
    right = train.objects == train.canonical[:, None]
    wrong = (~right).double()
    weights = torch.where(right, 1 - settings.spread, settings.spread * wrong / wrong.sum(1, keepdim=True))
    with last_layer_at_the_end(model, tokens=1):
        supervised.fit_soft(run, train.objects, weights.float())
    model.eval()
    if not checks.enough:
        raise Invalid(
            f"teach.most_steps = {settings.most_steps}: the model answers {checks.rows[-1]['accuracy']:.3f} of the "
            f"selection prompts after them, teach.level = {settings.level:g} was asked for: must be more steps, "
            "another learning rate, or a lower level"
        )
    return checks.rows
