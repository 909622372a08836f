"""Supervised fine-tuning on answers alone, of one token or several, with TRL's SFTTrainer."""

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Float, Int
from torch import Tensor
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from stages.learning.run import Run
from stages.learning.schedule import optimiser
from stages.learning.trainers import KeepCheckpoints, common_arguments, refuse_dropout, train_quietly
from stages.pipeline.stage import Invalid

NO_LOSS = -100  # as a label


def fit(
    run: Run,
    answers: Int[Tensor, "n *length"],
    extra_ids: Int[Tensor, "step extra u"] | None = None,
    extra_answers: Int[Tensor, "step extra"] | None = None,
) -> None:
    """Train `run.model` by cross-entropy on the answers' tokens alone: its mean over all of them in a step.

    Args:
        answers: target of each row of `run.train`; only rows in `run.order` are used.
        extra_ids, extra_answers: further prompts of each step with their targets, on top of the new-task
            prompts; they may have another length.
    """
    order = torch.from_numpy(run.order)
    if run.train.several_tokens:
        rows = []
        for step in range(len(order)):
            rows += _completed(run.train.input_ids[order[step]], answers[order[step]])
            if extra_ids is not None and extra_answers is not None:
                rows += _completed(extra_ids[step], extra_answers[step])
        _train(run, rows, len(rows) // len(order), SFTTrainer)
        return
    targets = answers[order]
    sequences = torch.cat([run.train.input_ids[order], targets[..., None]], -1)
    if extra_ids is None or extra_answers is None:
        fit_sequences(run, sequences, targets)
        return
    parts = sequences, torch.cat([extra_ids, extra_answers[..., None]], -1)
    lengths, targets = [part.shape[-1] for part in parts], torch.cat([targets, extra_answers], 1)
    padded = torch.cat([torch.nn.functional.pad(part, (0, max(lengths) - part.shape[-1])) for part in parts], 1)
    if lengths[0] == lengths[1]:
        fit_sequences(run, padded, targets)
    else:
        fit_sequences(run, padded, targets, PartsTrainer, sizes=[part.shape[1] for part in parts], lengths=lengths)


class PartsTrainer(SFTTrainer):
    """SFTTrainer whose batches have two parts of sequences of different length, padded at the right; each part is a
    pass of its own without padding, so that no mask and no shifted position is needed. The label of a sequence is its
    last token.

    Args:
        sizes: sequences of each part.
        lengths: tokens of a sequence of each part.
    """

    def __init__(self, *args: Any, sizes: Sequence[int], lengths: Sequence[int], **kwargs: Any) -> None:
        self.sizes, self.lengths = list(sizes), list(lengths)
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        parts = zip(inputs["input_ids"].split(self.sizes), self.lengths, strict=True)
        logits = [
            model(input_ids=rows[:, :length], logits_to_keep=2, use_cache=False).logits[:, -2] for rows, length in parts
        ]
        return torch.nn.functional.cross_entropy(torch.cat(logits), inputs["labels"][:, -1])


def _completed(prompts: Int[Tensor, "n t"], answers: Int[Tensor, "n *length"]) -> list[dict[str, list[int]]]:
    """Prompts with their answers, each as long as it is, and labels at the answers' tokens alone."""
    rows = []
    for prompt, answer in zip(prompts.tolist(), answers.reshape(len(answers), -1).tolist(), strict=True):
        said = [token for token in answer if token >= 0]
        rows.append({"input_ids": prompt + said, "labels": [NO_LOSS] * len(prompt) + said})
    return rows


class SoftTargetTrainer(SFTTrainer):
    """SFTTrainer whose target is a distribution over a few next tokens; the label of a prompt is its row number.

    Args:
        options: the tokens of each training row that have some probability.
        weights: their probabilities.
    """

    def __init__(self, *args: Any, options: Int[Tensor, "n k"], weights: Float[Tensor, "n k"], **kwargs: Any) -> None:
        self.options, self.weights = options, weights
        super().__init__(*args, **kwargs)

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        logits = model(input_ids=inputs["input_ids"], logits_to_keep=1, use_cache=False).logits[:, -1]
        rows = inputs["labels"][:, -1].cpu()
        options, weights = (part[rows].to(logits.device) for part in (self.options, self.weights))
        return -(weights * logits.log_softmax(-1).gather(1, options)).sum(-1).mean()


def fit_soft(run: Run, options: Int[Tensor, "n k"], weights: Float[Tensor, "n k"]) -> None:
    """Train `run.model` by cross-entropy with a distribution over the answer token.

    Args:
        options: tokens of each row of `run.train`.
        weights: their probabilities; 0 for what pads a row.
    """
    rows = torch.from_numpy(run.order)
    fit_sequences(run, run.train.input_ids[rows], rows, SoftTargetTrainer, options=options, weights=weights)


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
    refuse_several_tokens(run)
    batch = sequences.shape[1]
    sequences = sequences.flatten(0, 1)
    labels = torch.full_like(sequences, NO_LOSS)
    labels[:, -1] = last_labels.flatten()
    rows = [{"input_ids": ids, "labels": of} for ids, of in zip(sequences.tolist(), labels.tolist(), strict=True)]
    _train(run, rows, batch, trainer_class, **extra)


def refuse_several_tokens(run: Run) -> None:
    """Of an arm that learns from one-token answers alone.

    Raises:
        Invalid: the new task's have several.
    """
    if run.train.several_tokens:
        raise Invalid(
            f"arm '{run.arm}' learns from answers of one token, and those of the new task have several: must be left "
            "out of arms"
        )


def _train(
    run: Run, rows: list[dict[str, list[int]]], batch: int, trainer_class: type[SFTTrainer], **extra: Any
) -> None:
    """Train on rows of token ids and labels, so many a step; TRL pads shorter ones behind their ends."""
    refuse_dropout(run.model)
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
            train_dataset=Dataset.from_list(rows),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.watcher, batch)],
            **extra,
        )
        train_quietly(trainer)
