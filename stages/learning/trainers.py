"""What both TRL trainers are told: nothing that differs between arms, no default that matters left alone."""

from typing import Any

from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from stages.learning.run import Run, Watcher
from stages.pipeline.stage import Invalid

# What TRL says of a step -> its name in `NOTED`.
LOGGED = {
    "grad_norm": "gradient_norm",
    "clip_ratio/region_mean": "clip_fraction",
    "entropy": "entropy",
    "reward": "reward",
}


def common_arguments(run: Run, output_dir: str) -> dict[str, Any]:
    """Arguments of `SFTConfig` and `GRPOConfig` alike.

    The optimiser and its schedule are handed over as objects (`schedule.optimiser`); the entries here only
    keep the trainers' own defaults (bfloat16, gradient checkpointing, random order, logging) from applying.
    """
    return {
        "output_dir": output_dir,
        "max_steps": run.training.steps,
        "gradient_accumulation_steps": 1,
        "max_grad_norm": run.training.clip,
        "bf16": False,
        "fp16": False,
        "use_cpu": run.model.device.type == "cpu",
        "gradient_checkpointing": False,
        "seed": run.training.seed + run.seed,
        "train_sampling_strategy": "sequential",  # the dataset is already in the order of `run.order`
        "shuffle_dataset": False,
        "remove_unused_columns": False,
        "dataloader_num_workers": 0,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "steps",  # for `KeepCheckpoints`; nothing is printed or written
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }


def refuse_dropout(model: PreTrainedModel) -> None:
    """Raise if the model would drop units: TRL samples in training mode, so from another model each time.

    Raises:
        Invalid: some dropout rate in the model's config is not 0.
    """
    for key, value in model.config.to_dict().items():
        if ("dropout" in key or "pdrop" in key) and value:
            raise Invalid(f"{key} = {value} in the config of the base: must be 0, arms are compared without dropout")


def train_quietly(trainer: Trainer) -> None:
    """Train; nothing is printed, the recorder tells what there is to tell."""
    trainer.remove_callback(PrinterCallback)
    trainer.train()


class KeepCheckpoints(TrainerCallback):
    """Tells the recorder of every gradient step of a TRL trainer; ends the training where it says so.

    Args:
        recorder: of the run.
        completions: answers that are learned from in each step.
        iterations: steps in turn that learn from the same ones.
    """

    def __init__(self, recorder: Watcher, completions: int, iterations: int = 1) -> None:
        self._recorder, self._completions, self._iterations = recorder, completions, iterations

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._recorder.begin()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        batches = -(-state.global_step // self._iterations)
        if self._recorder.after(state.global_step, batches * self._completions):
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # comes after `on_step_end` of the same step; the summary at the end of the training has none of these
        found = {column: (logs or {})[name] for name, column in LOGGED.items() if name in (logs or {})}
        self._recorder.note(state.global_step, found)
