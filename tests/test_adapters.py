"""LoRA in fine-tuning: what is kept is a plain model that answers as the adapted one does."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stages.learning import adapters
from stages.learning.arms import grpo, sft_gold
from stages.pipeline.stage import Invalid
from tests.test_learning import TRAINING, tiny_model, tiny_prompts, tiny_run

LORA: Any = SimpleNamespace(rank=2, alpha=4, modules=("q_proj", "down_proj"))


def test_fresh_adapters_change_nothing_and_merged_ones_answer_alike() -> None:
    model, plain = tiny_model(), tiny_model()
    adapted = adapters.with_adapters(model, LORA, seed=0)
    before = adapters.plain_weights(adapted)
    assert set(before) == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(before[name], weight) for name, weight in plain.named_parameters())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    plain.load_state_dict(adapters.plain_weights(adapted))
    ids = tiny_prompts().input_ids
    error = (adapted(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
    effect = (tiny_model()(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
    print(f"max error {error:.1e}, effect {effect:.1e}")
    assert error < 1e-4 < 1e-1 < effect


@pytest.mark.parametrize("arm", [sft_gold, grpo], ids=["sft_gold", "grpo"])
def test_arms_train_adapters_and_nothing_else(arm: SimpleNamespace) -> None:
    """Checkpoints have the names and shapes of the base, and differ from it by matrices of the rank."""
    run = tiny_run(arm.__name__.rpartition(".")[2], rate=1e-2, training=replace(TRAINING, lora=LORA))
    start = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    adapted = adapters.with_adapters(run.model, LORA, seed=0)
    object.__setattr__(run.recorder, "_model", adapted)
    arm.train(replace(run, model=adapted))
    last = {
        name.partition("/")[2]: weight for name, weight in run.recorder.weights.items() if name.startswith("000004/")
    }
    assert {name: weight.shape for name, weight in last.items()} == {n: w.shape for n, w in start.items()}
    changes = {name: last[name] - start[name] for name in start}
    moved = {name for name, change in changes.items() if change.abs().max() > 0}
    assert moved == {name for name in start if "q_proj" in name or "down_proj" in name}
    for name in moved:
        values = torch.linalg.svdvals(changes[name].double())
        assert values[1] > 1e-9 and values[2] < 1e-4 * values[0], (name, values)
    assert run.recorder.rows[-1]["weight_norm"] == pytest.approx(
        torch.stack([change.double().square().sum() for change in changes.values()]).sum().sqrt().item(), rel=1e-4
    )


def test_the_seed_decides_the_adapters_and_a_missing_module_is_named() -> None:
    first, same, other = (
        {name: w for name, w in adapters.with_adapters(tiny_model(), LORA, seed).named_parameters() if "lora_A" in name}
        for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    wrong: Any = SimpleNamespace(rank=2, alpha=4, modules=("q_proj", "c_attn"))
    with pytest.raises(Invalid, match="'c_attn' must be one of down_proj"):
        adapters.with_adapters(tiny_model(), wrong, seed=0)


def test_a_head_that_is_the_embedding_gets_no_adapter() -> None:
    model: Any = tiny_model()
    head: Any = SimpleNamespace(rank=2, alpha=4, modules=("q_proj", "lm_head"))
    adapters.with_adapters(tiny_model(), head, seed=0)
    model.lm_head.weight = model.model.embed_tokens.weight
    with pytest.raises(Invalid, match="'lm_head' shares its matrix with the embeddings of this base"):
        adapters.with_adapters(model, head, seed=0)
