"""Supervised fine-tuning on answers that are drawn from the model while it learns."""

from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from trl.trainer.sft_trainer import SFTTrainer

from stages.learning import supervised
from stages.learning.answers import draw_valid
from stages.learning.run import Run


class OwnAnswersTrainer(SFTTrainer):
    """SFTTrainer that fills in the answers itself; the label of a sequence is its row number, its last token is
    replaced.

    Args:
        source: the run whose prompts, order and draws are used.
    """

    def __init__(self, *args: Any, source: Run, **kwargs: Any) -> None:
        self.run, self.generator = source, source.draw("answers")
        self.answers: dict[int, int] = {}  # row -> answer, of the steps up to the next draw
        super().__init__(*args, **kwargs)

    def draw_answers(self, step: int) -> None:
        """Draw the answers of the steps from `step` (from 0) up to the next draw."""
        rows = torch.from_numpy(self.run.order[step : step + self.run.section.every]).unique()
        drawn = draw_valid(self.run, rows, self.generator)
        self.answers = dict(zip(rows.tolist(), drawn.tolist(), strict=True))

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step % self.run.section.every == 0:
            self.draw_answers(self.state.global_step)
        rows: Int[Tensor, " n"] = inputs["labels"][:, -1]
        answers = rows.new_tensor([self.answers[int(row)] for row in rows])
        for name in ("input_ids", "labels"):
            inputs[name] = torch.cat([inputs[name][:, :-1], answers[:, None]], 1)
        return super().compute_loss(model, inputs, *args, **kwargs)


def fit(run: Run) -> None:
    """Train `run.model`; the arm's settings say how often answers are drawn."""
    rows = torch.from_numpy(run.order)
    prompts = run.train.input_ids[rows]
    supervised.fit_sequences(run, torch.cat([prompts, prompts[..., -1:]], -1), rows, OwnAnswersTrainer, source=run)
