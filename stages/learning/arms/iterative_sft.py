"""Supervised on the model's own valid answers, drawn anew every few steps: between `self_sft` and `reinforce`.

Before step 1, 1 + k, 1 + 2 k, ... (k = `every`) the answers of the next k steps are drawn from the model as it is then,
restricted to the valid ones. With k = 1 it is on-policy, with k = the number of steps it is `self_sft`.
"""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stages.learning.probes import last_logits
from stages.learning.run import Run
from stages.learning.schedule import optimiser
from stages.learning.trainers import KeepCheckpoints, common_arguments, refuse_dropout, train_quietly


class OwnAnswersTrainer(SFTTrainer):
    """SFTTrainer that fills in the answers itself; the label of a sequence is its row number, its last token is
    replaced.

    Args:
        run: whose prompts, order and draws are used.
    """

    def __init__(self, *args: Any, run: Run, **kwargs: Any) -> None:
        self.run, self.generator = run, run.draw("answers")
        self.answers: dict[int, int] = {}  # row -> answer, of the steps up to the next draw
        super().__init__(*args, **kwargs)

    def draw_answers(self, step: int) -> None:
        """Draw the answers of the steps from `step` (from 0) up to the next draw."""
        rows = torch.from_numpy(self.run.order[step : step + self.run.section.every]).unique()
        valid = self.run.train.valid[rows]
        training = self.run.model.training
        logits = last_logits(self.run.model.eval(), self.run.train.input_ids[rows]) / self.run.section.temperature
        self.run.model.train(training)
        of_valid = logits.gather(1, valid.clamp(min=0)).masked_fill(valid < 0, -torch.inf)
        choice = torch.multinomial(of_valid.softmax(-1), 1, generator=self.generator)
        self.answers = dict(zip(rows.tolist(), valid.gather(1, choice)[:, 0].tolist(), strict=True))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step % self.run.section.every == 0:
            self.draw_answers(self.state.global_step)
        rows: Int[Tensor, " n"] = inputs["labels"][:, -1]
        answers = torch.tensor([self.answers[int(row)] for row in rows])
        for name in ("input_ids", "labels"):
            inputs[name] = torch.cat([inputs[name][:, :-1], answers[:, None]], 1)
        return super().compute_loss(model, inputs, *args, **kwargs)


def train(run: Run) -> None:
    refuse_dropout(run.model)
    rows = torch.from_numpy(run.order).flatten()
    prompts = run.train.input_ids[rows]
    sequences = torch.cat([prompts, prompts[:, -1:]], 1)
    labels = torch.full_like(sequences, -100)
    labels[:, -1] = rows
    with tempfile.TemporaryDirectory() as folder:
        trainer = OwnAnswersTrainer(
            model=run.model,
            args=SFTConfig(
                **common_arguments(run, folder),
                per_device_train_batch_size=run.training.prompts_per_step,
                max_length=None,
                packing=False,
                loss_type="nll",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": sequences.tolist(), "labels": labels.tolist()}),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.recorder, completions_per_step=run.training.prompts_per_step)],
            run=run,
        )
        train_quietly(trainer)
