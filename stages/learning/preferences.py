"""Learning from pairs of answers, one preferred to the other, with TRL's DPOTrainer."""

import tempfile
from typing import Any

import torch
from datasets import Dataset
from jaxtyping import Int
from torch import Tensor
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from stages.learning.adapters import adapter_layers
from stages.learning.answers import of_all_rows, used_rows
from stages.learning.probes import last_log_probs
from stages.learning.run import Run
from stages.learning.schedule import optimiser
from stages.learning.supervised import refuse_several_tokens
from stages.learning.trainers import KeepCheckpoints, common_arguments, refuse_dropout, train_quietly
from stages.pipeline.stage import Invalid


class PairsTrainer(DPOTrainer):
    """DPOTrainer for pairs that are token ids already and carry the log-probabilities of the base."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *args: Any, **kwargs: Any) -> Dataset:
        return dataset


def draw_wrong(run: Run, generator: torch.Generator) -> Int[Tensor, " rows"]:
    """A wrong answer for every row that the run uses, drawn from `run.model` as it is now, restricted to the tokens
    that are no valid answer; -1 in all other rows.

    Raises:
        Invalid: answers have several tokens.
    """
    refuse_several_tokens(run)
    rows = used_rows(run)
    log_p = last_log_probs(run.model, run.train.input_ids[rows])
    valid = run.train.valid[rows]
    right = torch.zeros_like(log_p).scatter_add_(1, valid.clamp(min=0), (valid >= 0).to(log_p.dtype)) > 0
    wrong = log_p.masked_fill(right, -torch.inf).softmax(-1)
    return of_all_rows(run, rows, torch.multinomial(wrong, 1, generator=generator)[:, 0])


def fit(run: Run, chosen: Int[Tensor, " n"], rejected: Int[Tensor, " n"], beta: float) -> None:
    """Train `run.model` by the sigmoid loss of DPO: the mean over pairs of -log sigmoid(beta * (change of log p(chosen)
    - change of log p(rejected))), the changes since the base, which is the model as it is given.

    Args:
        chosen, rejected: answers of each row of `run.train`, of one token; only rows in `run.order` are used.
        beta: the larger, the less the model moves.

    Raises:
        Invalid: adapters sit on the head, which TRL's loss would pass over.
    """
    refuse_dropout(run.model)
    head = run.model.get_output_embeddings()
    if any(layer is head for layer in adapter_layers(run.model).values()):
        raise Invalid(
            f"finetune.common.lora.modules: the head must not be among them with arm '{run.arm}', whose loss takes its "
            "plain matrix"
        )
    rows = torch.from_numpy(run.order).flatten()
    used, place = rows.unique(return_inverse=True)
    of_base = last_log_probs(run.model, run.train.input_ids[used]).float()
    pairs = {"prompt_ids": run.train.input_ids[rows].tolist()}
    for name, answers in (("chosen", chosen[rows]), ("rejected", rejected[rows])):
        pairs[f"{name}_ids"] = answers[:, None].tolist()
        pairs[f"ref_{name}_logps"] = of_base[place, answers].tolist()
    with tempfile.TemporaryDirectory() as folder:
        common = common_arguments(run, folder)
        del common["shuffle_dataset"]  # which DPOConfig does not know; its data come in order
        trainer = PairsTrainer(
            model=run.model,
            args=DPOConfig(
                **common,
                per_device_train_batch_size=run.training.prompts_per_step,
                beta=beta,
                loss_type=["sigmoid"],
                max_length=None,
                precompute_ref_log_probs=True,
            ),
            train_dataset=Dataset.from_dict(pairs),
            processing_class=run.tokenizer,
            optimizers=optimiser(run.model, run.training, run.learning_rate),
            callbacks=[KeepCheckpoints(run.watcher, 2 * run.training.prompts_per_step)],
        )
        train_quietly(trainer)
