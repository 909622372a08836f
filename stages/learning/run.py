"""One run, that is one arm at one seed and one learning rate: what an arm is given, and what is kept of it.

The contract of an arm. An arm `<name>` is one file, `stages/learning/arms/<name>.py`, found by being there:

    class Settings(Section)            what `finetune.<name>` in params.yaml must say, each key with its type and range
    def train(run: Run) -> None        reads it as `run.section`

`train` changes `run.model` in place and calls `run.recorder.after(step, completions)` after every gradient step, which
keeps weights and scores wherever a checkpoint is due. `supervised.fit` and `reinforcement.fit` do both. It uses the
prompts of step i, `run.order[i]`, and no other new-task prompts; all its random draws come from `run.draw(purpose)`.
The file is imported whenever params are read, so it imports torch and TRL inside `train` alone.
Arms do not import each other.
"""

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from safetensors.torch import save_file

from stages.learning.adapters import adapter_config, adapter_layers, adapter_weights
from stages.learning.checkpoints import ADAPTER_CONFIG, checkpoint_file
from stages.learning.probes import Probe
from stages.learning.settings import CurveRow, Training
from stages.pipeline.files import replacing_file, write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

    from stages.tasks.examples import Prompts


class Watcher(ABC):
    """Is told of every gradient step of a training."""

    def begin(self) -> None:  # noqa: B027  # no one need hear it
        """Before the first step."""

    @abstractmethod
    def after(self, step: int, completions: int) -> bool:
        """To be called after gradient step `step` (from 1); `completions` = answers learned from so far. Whether
        training may end there."""

    def note(self, step: int, found: dict[str, float]) -> None:  # noqa: B027  # no one need hear it
        """What a trainer says of gradient step `step`, after it: some of `NOTED`."""


# The norm of the gradient before it is clipped; the share of answers' tokens whose probability ratio was clipped; the
# mean entropy of the answers' tokens, in nats; the mean reward.
NOTED = ("gradient_norm", "clip_fraction", "entropy", "reward")
IN_CURVE = ("gradient_norm", "clip_fraction")  # of these, those that stand in the rows of checkpoints, too
STEP_COLUMNS = ("step", *NOTED, "update_norm")


class Recorder(Watcher):
    """Writes weights and keeps scores at the checkpoints of a run, and reports its progress.

    Attributes:
        rows: one dict per checkpoint, the base first (step 0): the columns of the curve after
            `learning_rate`.
        steps: one dict per gradient step, checkpoint or not: `STEP_COLUMNS`, as far as they are known. `update_norm` is
            the Euclidean norm of what the step changed in the trained parameters (with LoRA, the adapters' own).
        probe: what they are scored by.
        folder: where the weights are (see `stages/learning/checkpoints.py`); none are kept in memory.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        probe: Probe,
        steps: tuple[int, ...],
        report: Callable[[int, CurveRow], None],
        folder: Path,
    ) -> None:
        self.rows: list[CurveRow] = []
        self.steps: list[CurveRow] = []
        self.probe, self.folder = probe, folder
        self._model, self._steps, self._report = model, frozenset(steps), report
        self._before: list[torch.Tensor] = []  # the trained parameters before the step, once there is one
        self._add_row(0, 0, 0)

    def begin(self) -> None:
        self._before = [weight.detach().clone() for weight in self._trained()]

    def after(self, step: int, completions: int) -> bool:
        """The training of an arm takes all its steps."""
        self.steps.append({"step": step} | self._update())
        if step in self._steps:
            self.keep(step, gradient_steps=step, completions=completions)
        self._report(step, self.rows[-1])
        return False

    def note(self, step: int, found: dict[str, float]) -> None:
        if self.steps and self.steps[-1]["step"] == step:
            self.steps[-1] |= found
        if self.rows[-1]["step"] == step:
            self.rows[-1] |= {column: found[column] for column in IN_CURVE if column in found}

    def _trained(self) -> list[torch.Tensor]:
        return [weight for weight in self._model.parameters() if weight.requires_grad]

    @torch.no_grad()
    def _update(self) -> CurveRow:
        """Norm of what the step changed; nothing where the beginning was not told."""
        if not self._before:
            return {}
        total = 0.0
        for before, weight in zip(self._before, self._trained(), strict=True):
            total += (weight - before).double().square().sum().item()
            before.copy_(weight)
        return {"update_norm": total**0.5}

    def keep(self, step: int, gradient_steps: int, completions: int) -> None:
        """Write the model as it is now as checkpoint `step`."""
        if adapter_layers(self._model):
            weights = adapter_weights(self._model)
            if not (self.folder / ADAPTER_CONFIG).is_file():
                write_json(self.folder / ADAPTER_CONFIG, adapter_config(self._model))
        else:
            weights = {name: weight.detach() for name, weight in self._model.named_parameters()}
        with replacing_file(checkpoint_file(self.folder, step)) as temporary:
            save_file({name: weight.cpu() for name, weight in weights.items()}, temporary, metadata={"format": "pt"})
        self._add_row(step, gradient_steps, completions)

    def _add_row(self, step: int, gradient_steps: int, completions: int) -> None:
        counts = {"step": step, "gradient_steps": gradient_steps, "completions": completions}
        self.rows.append(counts | self.probe.measure(self._model))


@dataclass(frozen=True)
class Run:
    """What an arm is given.

    Attributes:
        arm, seed, learning_rate: which run this is.
        training: what all arms share.
        section: the arm's own params.
        model: the base, in float32, to be changed in place.
        tokenizer: of the base.
        train: the new task's training split.
        rehearsal: the old task's, for arms that rehearse it; its prompts may have another length.
        order: rows of `train` used in each step; equal for all arms of a seed.
        watcher: is told of every step; of an arm its `recorder`, which keeps checkpoints.
    """

    arm: str
    seed: int
    learning_rate: float
    training: Training
    section: Any
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerFast"
    train: "Prompts"
    rehearsal: "Prompts"
    order: Int[np.ndarray, "step prompt"]
    watcher: Watcher

    @property
    def recorder(self) -> Recorder:
        """What keeps the checkpoints of an arm."""
        assert isinstance(self.watcher, Recorder)
        return self.watcher

    def draw(self, purpose: str) -> torch.Generator:
        """A generator for one purpose; equal for all learning rates, so that they differ in nothing else, and for arms
        whose settings name the same `stream`."""
        stream: str = getattr(self.section, "stream", None) or self.arm
        entropy = [self.training.seed, self.seed, zlib.crc32(stream.encode()), zlib.crc32(purpose.encode())]
        return torch.Generator().manual_seed(int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1))
