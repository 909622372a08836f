"""Supervised fine-tuning on one answer token, with TRL's SFTTrainer."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stages.learning.run import Run
from stages.learning.schedule import optimiser
from stages.learning.trainers import KeepCheckpoints, common_arguments, refuse_dropout, train_quietly


def fit(
    run: Run,
    answers: Int[Tensor, "n"],
    extra_ids: Int[Tensor, "step extra t"] | None = None,
    extra_answers: Int[Tensor, "step extra"] | None = None,
) -> None:
    """Train `run.model` by cross-entropy on the answer token alone.

    Args:
        answers: target token of each row of `run.train`; only rows in `run.order` are used.
        extra_ids, extra_answers: further prompts of each step with their targets, on top of the new-task
            prompts.
    """
    order = torch.from_numpy(run.order)
    ids, targets = run.train.input_ids[order], answers[order]
    if extra_ids is not None and extra_answers is not None:
        ids, targets = torch.cat([ids, extra_ids], 1), torch.cat([targets, extra_answers], 1)
    fit_sequences(run, torch.cat([ids, targets[..., None]], -1), targets)


def fit_sequences(
    run: Run,
    sequences: Int[Tensor, "step batch t"],
    last_labels: Int[Tensor, "step batch"],
    trainer_class: type[SFTTrainer] = SFTTrainer,
    **extra: Any,
) -> None:
    """Train `run.model` on the sequences of each step, by a loss at their last position alone.

    Args:
        last_labels: label of the last position of each sequence; all others have none.
        trainer_class: what knows the loss; by default, cross-entropy with the label.
        extra: further arguments of it.
    """
    refuse_dropout(run.model)
    batch = sequences.shape[1]
    sequences = sequences.flatten(0, 1)
    labels = torch.full_like(sequences, -100)  # -100 = no loss
    labels[:, -1] = last_labels.flatten()
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=run.model,
            args=SFTConfig(
                **common_arguments(run, folder),
                per_device_train_batch_size=batch,
                max_length=None,
                packing=False,
                loss_type="nll",
                dataset_kwargs={"skip_prepare_dataset": True},
            ),
            train_dataset=Dataset.from_dict({"input_ids": sequences.tolist(), "labels": labels.tolist()}),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.recorder, completions_per_step=batch)],
            **extra,
        )
        train_quietly(trainer)
