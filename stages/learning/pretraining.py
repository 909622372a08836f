"""Training of a small Llama-architecture base that solves entity tracking.

1. Phases follow one another as in the params; each ends at the first check at which the model reaches its
   `until`. The last one always takes all its steps and must hold its `until` at the end. So the model is
   equally settled in every seed: always the same number of steps after the transition that matters.
2. The loss of a step is the cross-entropy with the soft targets of `curriculum.py`, plus a small
   language-model loss on all tokens.
3. The learning rate warms up, stays, and falls as a cosine during the last phase.
4. With `settle`, so many further steps follow on the batches of the last phase, soft targets and all, at the
   learning rate that it ended with. How settled a base is decides how well it keeps the old task later on.
5. With `stop_at`, training ends at the first check, of whatever phase, at which the old task with all boxes is
   answered that well: a half-trained base, which still has something of the old task to learn.
6. The pieces of a step's batch are shared out among `processes` (see `shared_gradient.py`).
7. A phase that is not passed in `most_steps`, or a `stop_at` that is never reached, is stuck: the attempt is
   given up, and the next one starts from weights and batches of the next derived seed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from stages.learning.curriculum import Batch, Phase, draw_batch, draw_repeats
from stages.learning.knowledge import old_task
from stages.learning.shared_gradient import SharedGradient
from stages.tasks.contexts import Split
from stages.tasks.entity_tracking import draw_queries
from stages.tasks.templates import STANDARD
from stages.tasks.vocabulary import BOS, EOS, PAD, WordVocabulary


@runtime_checkable
class ModelSize(Protocol):
    """Sizes of the Llama architecture; `mlp` is the width between its matrices, `init_std` that of all
    weights."""

    layers: int
    heads: int
    head_dim: int
    width: int
    mlp: int
    rope_theta: float
    init_std: float


@runtime_checkable
class Optimiser(Protocol):
    """AdamW: `warmup` in steps, `clip` the largest gradient norm, `final` the last learning rate's part of
    the first."""

    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    clip: float
    warmup: int
    final: float


@runtime_checkable
class Until(Protocol):
    """What ends a phase: accuracy on `template` (or on `repeats`) with that many boxes."""

    template: str
    boxes: int
    accuracy: float


@runtime_checkable
class TrainingPhase(Phase, Protocol):
    """A phase of the curriculum and its end; without `until` it takes all of `most_steps`."""

    until: Until | None
    most_steps: int


@runtime_checkable
class Settings(Protocol):
    """The section `pretrain` of params.yaml, as far as training needs it; `settle` in steps, `stop_at` an
    accuracy or None."""

    model: ModelSize
    optimiser: Optimiser
    batch: int
    language_model_weight: float
    check_every: int
    check_prompts: int
    settle: int
    stop_at: float | None
    curriculum: Mapping[str, TrainingPhase]


class Stuck(Exception):
    """A phase was not passed in its number of steps; the message says which and how far it came."""


@dataclass(frozen=True)
class Progress:
    """One check: step, phase, mean loss since the last check, and what was measured."""

    step: int
    phase: str
    loss: float
    accuracy: float  # the main template with all boxes
    p_correct: float
    induction: float  # second halves of strings said twice


# Called with the phase, the step and most steps of the phase, and the last check.
Report = Callable[[str, int, int, Progress | None], None]

# Multiplications of float32 matrices may round their inputs to bfloat16 where the processor is faster at
# that. Only training does so; whatever is measured later is computed in float32.
MATMUL_PRECISION = "medium"
ATTENTION = "stages_training"  # the fused kernels suit longer texts; here they are slower
ROWS_AT_ONCE = 16  # rows of one forward and backward; more fall out of the processor's cache
REPEATS = "repeats"  # the `until.template` that means strings said twice
SETTLE = "settle"  # the name of the steps after the last phase, in the checks
_INDUCTION_LENGTH = 16


def build_model(vocabulary: WordVocabulary, size: ModelSize, seed: int) -> LlamaForCausalLM:
    """A model with random weights that are a function of the seed."""
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=size.width,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.head_dim,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        initializer_range=size.init_std,
        tie_word_embeddings=False,
        pad_token_id=vocabulary.ids[PAD],
        bos_token_id=vocabulary.ids[BOS],
        eos_token_id=vocabulary.ids[EOS],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    return model


def _attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Eager attention that passes over the large matrix of scores as seldom as it can: the scale goes into the
    queries, and the mask is added inside the multiplication."""
    scores = torch.baddbmm(mask[0], (query * scaling).flatten(0, 1), key.flatten(0, 1).transpose(1, 2))
    mixed = torch.bmm(scores.softmax(dim=-1), value.flatten(0, 1))
    return mixed.view(query.shape).transpose(1, 2), None


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, eager_mask)


def train(
    vocabulary: WordVocabulary,
    settings: Settings,
    boxes: int,
    seed: list[int],
    report: Report = lambda *_: None,
    processes: int = 1,
) -> tuple[LlamaForCausalLM, list[Progress]]:
    """Train a base from random weights.

    Args:
        vocabulary: token ids of words.
        settings: sizes, optimiser and curriculum.
        boxes: the most boxes that a context has; phases with more are capped.
        seed: weights and batches are a function of it.
        report: called every step with the phase, the step, the most steps of the phase, and the last check.
        processes: of one thread each; the result does not depend on their number.

    Returns:
        the model in eval mode, and the checks.

    Raises:
        Stuck: a phase was not passed.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(MATMUL_PRECISION)
    try:
        return _train(vocabulary, settings, boxes, seed, report, processes)
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass(frozen=True)
class _Piece:
    """Rows of a batch, and what the summed losses of the whole batch are divided by."""

    rows: Batch
    answers: int
    following: int


def _train(
    vocabulary: WordVocabulary, settings: Settings, boxes: int, seed: list[int], report: Report, processes: int
) -> tuple[LlamaForCausalLM, list[Progress]]:
    weights_seed, batches_seed, checks_seed = np.random.SeedSequence(seed).generate_state(3)
    model = build_model(vocabulary, settings.model, int(weights_seed)).train()
    rng = np.random.default_rng(batches_seed)
    checks = _Checks(vocabulary, settings, boxes, np.random.default_rng(checks_seed))

    def loss(piece: _Piece) -> Tensor:
        logits = model(piece.rows.ids, use_cache=False).logits
        answers, language = loss_sums(logits, piece.rows, vocabulary.ids[PAD])
        return answers / piece.answers + settings.language_model_weight * language / piece.following

    most_pieces = math.ceil(settings.batch / ROWS_AT_ONCE)
    with SharedGradient(model, loss, most_pieces, processes) as gradient:
        optimiser = torch.optim.AdamW(
            [gradient.weights],
            lr=settings.optimiser.learning_rate,
            betas=settings.optimiser.betas,
            weight_decay=settings.optimiser.weight_decay,
        )

        def step(phase: Phase, learning_rate: float) -> float:
            batch = draw_batch(rng, vocabulary, phase, settings.batch, boxes)
            total = gradient.compute(_pieces(batch))
            torch.nn.utils.clip_grad_norm_([gradient.weights], settings.optimiser.clip)
            optimiser.param_groups[0]["lr"] = learning_rate
            optimiser.step()
            return total

        curve = _take_phases(settings, step, model, checks, report)
    return model.eval(), curve


def _take_phases(
    settings: Settings,
    take_step: Callable[[Phase, float], float],
    model: LlamaForCausalLM,
    checks: "_Checks",
    report: Report,
) -> list[Progress]:
    """All phases in turn; `take_step` is given the phase and the learning rate, and returns the loss."""
    curve: list[Progress] = []
    losses: list[float] = []
    step = 0
    *_, last = settings.curriculum
    phases = [(name, phase, phase.most_steps) for name, phase in settings.curriculum.items()]
    if settings.settle:
        phases.append((SETTLE, settings.curriculum[last], settings.settle))
    for name, phase, most_steps in phases:
        passed = stop = False
        for phase_step in range(1, most_steps + 1):
            fall = phase_step / most_steps if name == last else float(name == SETTLE)
            losses.append(take_step(phase, _learning_rate(settings.optimiser, step, fall)))
            step += 1
            if phase_step % settings.check_every == 0 or phase_step == most_steps:
                curve.append(checks.progress(model, step, name, float(np.mean(losses))))
                losses.clear()
                passed = phase.until is None or checks.reached(model, phase.until, curve[-1]) >= phase.until.accuracy
                stop = settings.stop_at is not None and curve[-1].accuracy >= settings.stop_at
            report(name, phase_step, most_steps, curve[-1] if curve else None)
            if stop:
                return curve
            if passed and phase.until is not None and name not in (last, SETTLE):
                break
        if not passed and phase.until is not None:
            reached = checks.reached(model, phase.until, curve[-1])
            raise Stuck(
                f"phase '{name}' reached accuracy {reached:.2f} on '{phase.until.template}' after"
                f" {most_steps} steps, and needs {phase.until.accuracy:.2f}"
            )
    if settings.stop_at is not None:
        best = max(check.accuracy for check in curve)
        raise Stuck(f"no check reached accuracy {settings.stop_at:.2f} on {checks.boxes} boxes, the best {best:.2f}")
    return curve


def _pieces(batch: Batch) -> list[_Piece]:
    following = int(batch.lengths.sum()) - len(batch.ids)
    return [_Piece(rows, len(batch.place), following) for rows in batch.pieces(ROWS_AT_ONCE)]


def _learning_rate(optimiser: Optimiser, step: int, fall: float) -> float:
    """Linear warm-up, constant, then a cosine from 1 to `final` as `fall` goes from 0 to 1."""
    warm = min(1.0, (step + 1) / max(1, optimiser.warmup))
    cosine = optimiser.final + (1 - optimiser.final) * (1 + math.cos(math.pi * fall)) / 2
    return optimiser.learning_rate * warm * cosine


def loss_sums(logits: Float[Tensor, "b t v"], batch: Batch, pad: int) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    """Summed cross-entropies in nats: with the soft targets, and of all next tokens but padding."""
    log_p = logits.log_softmax(dim=-1)
    answers = -(batch.weights * log_p.flatten(0, 1)[batch.place].gather(1, batch.options)).sum()
    following = functional.nll_loss(
        log_p[:, :-1].flatten(0, 1), batch.ids[:, 1:].flatten(), ignore_index=pad, reduction="sum"
    )
    return answers, following


class _Checks:
    """Prompts of the selection split, drawn once, that phases are ended by."""

    def __init__(self, vocabulary: WordVocabulary, settings: Settings, boxes: int, rng: np.random.Generator):
        self.boxes = boxes
        self.prompts: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
        wanted = [(STANDARD, boxes)]
        for phase in settings.curriculum.values():
            if phase.until is not None and phase.until.template != REPEATS:
                wanted.append((phase.until.template, min(phase.until.boxes, boxes)))
        for template, size in dict.fromkeys(wanted):
            self.prompts[template, size] = draw_queries(
                rng, vocabulary, template, Split.SELECTION, settings.check_prompts, size
            )
        repeats = draw_repeats(rng, vocabulary, settings.check_prompts // 4, _INDUCTION_LENGTH)
        self.repeats = torch.from_numpy(repeats)

    def progress(self, model: LlamaForCausalLM, step: int, phase: str, loss: float) -> Progress:
        correct, probability = old_task(model, *self.prompts[STANDARD, self.boxes])
        return Progress(step, phase, loss, float(correct.mean()), float(probability.mean()), self._induction(model))

    def reached(self, model: LlamaForCausalLM, until: Until, check: Progress) -> float:
        """Accuracy at what ends a phase; `check` has just been made and may hold it already."""
        if until.template == REPEATS:
            return check.induction
        asked = until.template, min(until.boxes, self.boxes)
        if asked == (STANDARD, self.boxes):
            return check.accuracy
        correct, _ = old_task(model, *self.prompts[asked])
        return float(correct.mean())

    @torch.no_grad()
    def _induction(self, model: LlamaForCausalLM) -> float:
        predicted = model(self.repeats, use_cache=False).logits[:, _INDUCTION_LENGTH + 1 : -1].argmax(dim=-1)
        return float((predicted == self.repeats[:, _INDUCTION_LENGTH + 2 :]).double().mean())
