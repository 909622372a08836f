"""The DPO arm: TRL's trainer against a plain loop, and the wrong answers that it is given."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.learning import adapters, preferences
from stages.learning.arms import dpo
from stages.learning.last_layer import last_layer_at_the_end
from stages.learning.probes import last_log_probs
from stages.pipeline.stage import Invalid
from tests.plain_loop import train_plainly
from tests.test_learning import TRAINING, checkpoint, largest_difference, tiny_model, tiny_run

BETA = 0.7
SECTION = SimpleNamespace(beta=BETA)


def plain_dpo(run: Any, rejected: torch.Tensor, double: bool = False) -> torch.nn.Module:
    """Formula 7 of Rafailov et al. with two models, step by step."""
    model, base = tiny_model(), tiny_model()
    if double:
        model, base = model.double(), base.double()

    def loss(model: Any, _: int, rows: torch.Tensor) -> torch.Tensor:
        ids = run.train.input_ids[rows]
        now = model(input_ids=ids).logits[:, -1].log_softmax(-1)
        with torch.no_grad():
            before = base(input_ids=ids).logits[:, -1].log_softmax(-1)
        change = now - before
        margin = change.gather(1, run.train.canonical[rows, None]) - change.gather(1, rejected[rows, None])
        return -torch.nn.functional.logsigmoid(BETA * margin).mean()

    return train_plainly(model, run, loss)


@pytest.mark.parametrize("steps", [1, TRAINING.steps])
def test_dpo_equals_a_plain_loop(steps: int) -> None:
    """The first step against float64: the gradient is that of the loss at the base, where all margins are 0."""
    training = replace(TRAINING, steps=steps, dense_until=steps, sparse_checkpoints=0)
    run = tiny_run("dpo", section=SECTION, training=training)
    rejected = preferences.draw_wrong(run, run.draw("wrong answers"))
    with last_layer_at_the_end(run.model, tokens=2):
        dpo.train(run)
    oracle = plain_dpo(run, rejected, double=steps == 1)
    error, moved = largest_difference(run.model, oracle), largest_difference(run.model, tiny_model())
    print(f"maximum error {error:.1e}, largest change {moved:.1e}")
    assert error < 1e-6 < 5e-4 < moved
    assert [row["step"] for row in run.recorder.rows] == list(range(steps + 1))
    assert run.recorder.rows[-1]["completions"] == 2 * training.prompts_per_step * steps


def test_the_wrong_answers_are_what_the_base_says_wrongly() -> None:
    """Never a valid answer; over many draws, as often as the base says them."""
    run = tiny_run("dpo", section=SECTION)
    n = len(run.train)
    drawn = torch.stack([preferences.draw_wrong(run, torch.Generator().manual_seed(i)) for i in range(400)])
    used = torch.from_numpy(run.order).unique()
    assert used.numel() < n and bool((drawn[:, [row for row in range(n) if row not in set(used.tolist())]] == -1).all())
    p = last_log_probs(run.model, run.train.input_ids).exp()
    for row in used.tolist():
        valid = run.train.valid[row][run.train.valid[row] >= 0]
        assert not torch.isin(drawn[:, row], valid).any()
        expected = p[row].clone()
        expected[valid] = 0
        expected /= expected.sum()
        found = torch.bincount(drawn[:, row], minlength=len(expected)) / len(drawn)
        assert float((found - expected).abs().max()) < 0.12


def test_learning_prefers_the_right_answer_to_the_drawn_one() -> None:
    training = replace(TRAINING, steps=20)
    run = tiny_run("dpo", 1e-2, SECTION, training)
    rejected = preferences.draw_wrong(run, run.draw("wrong answers"))
    dpo.train(run)
    used = torch.from_numpy(run.order).unique()

    def margin(model: Any) -> torch.Tensor:
        log_p = last_log_probs(model, run.train.input_ids[used])
        return log_p.gather(1, run.train.canonical[used, None]) - log_p.gather(1, rejected[used, None])

    before, after = margin(tiny_model()), margin(run.model)
    print(f"preferred {float((before > 0).double().mean()):.2f} -> {float((after > 0).double().mean()):.2f}")
    assert float((after > 0).double().mean()) > 0.95 > float((before > 0).double().mean())
    assert set(checkpoint(run, 20)) == set(dict(tiny_model().named_parameters()))


def test_adapters_on_the_head_are_refused() -> None:
    """Its log-probabilities come from the head's own matrix, so that such an adapter would not be trained."""
    run = tiny_run("dpo", section=SECTION)
    lora: Any = SimpleNamespace(rank=2, alpha=4, modules=("q_proj", "lm_head"))
    adapted = adapters.with_adapters(run.model, lora, seed=0)
    with pytest.raises(Invalid, match="the head must not be among them with arm 'dpo'"):
        dpo.train(replace(run, model=adapted))
