"""LoRA in fine-tuning: what is kept are adapters, which merged give a plain model that answers as the adapted one."""

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stages.circuits.lora import merged
from stages.learning import adapters
from stages.learning.arms import sft_gold
from stages.learning.checkpoints import checkpoint_file, read_checkpoint, set_weights
from stages.learning.probes import Probe
from stages.learning.run import Recorder, Run
from stages.learning.schedule import checkpoint_steps
from stages.learning.settings import Training
from stages.pipeline.checkpoints import ADAPTER_CONFIG, ADAPTER_WEIGHTS, load_adapter
from stages.pipeline.params.finetuning import trained_arms
from stages.pipeline.stage import Invalid
from tests.test_learning import (
    SECTION,
    TRAINING,
    checkpoint,
    section_with,
    tiny_examples,
    tiny_model,
    tiny_prompts,
    tiny_run,
)

LORA: Any = SimpleNamespace(rank=2, alpha=4, modules=("q_proj", "down_proj"))


def arrays(model: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: weight.detach().numpy() for name, weight in model.named_parameters()}


def adapted_run(arm: str, training: Training = TRAINING, folder: Path | None = None, section: Any = SECTION) -> Run:
    """A run whose model has adapters from the start, as a cell makes it."""
    run = tiny_run(arm, 1e-2, section, training=replace(training, lora=LORA), folder=folder)
    adapted = adapters.with_adapters(run.model, LORA, seed=0)
    probe = Probe.of(adapted, tiny_examples(), run.train)
    steps = checkpoint_steps(training)
    recorder = Recorder(adapted, probe, steps, lambda step, row: None, run.recorder.folder)
    return replace(run, model=adapted, watcher=recorder)


def test_fresh_adapters_change_nothing_and_merged_ones_answer_alike() -> None:
    run, plain = adapted_run("sft_gold"), tiny_model()
    adapted, folder = run.model, run.recorder.folder
    run.recorder.keep(0, gradient_steps=0, completions=0)
    before = read_checkpoint(folder, 0, arrays(tiny_model()))
    assert before.keys() == dict(plain.named_parameters()).keys()
    assert all(np.array_equal(before[name], weight) for name, weight in arrays(plain).items())
    assert run.recorder.rows[-1]["weight_norm"] == 0.0
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator))
    run.recorder.keep(1, gradient_steps=1, completions=0)
    set_weights(plain, read_checkpoint(folder, 1, arrays(tiny_model())))
    ids = tiny_prompts().input_ids
    error = (adapted(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
    effect = (tiny_model()(input_ids=ids).logits - plain(input_ids=ids).logits).abs().max().item()
    print(f"max error {error:.1e}, effect {effect:.1e}")
    assert error < 1e-4 < 1e-1 < effect


@pytest.mark.parametrize("arm", [arm for arm in trained_arms() if arm != "noise"])
def test_arms_train_adapters_and_nothing_else(arm: str) -> None:
    """Checkpoints hold adapters alone; merged, they have the names and shapes of the base, and differ from it by
    matrices of the rank."""
    section = section_with(beta=0.1 if arm == "dpo" else 0.0, every=2, fraction=0.5, probability=0.5)
    run, start = adapted_run(arm, section=section), arrays(tiny_model())
    importlib.import_module(f"stages.learning.arms.{arm}").train(run)
    assert len(checkpoint(run, 4)) == 2 * 2 * len(LORA.modules)
    last = read_checkpoint(run.recorder.folder, 4, start)
    assert {name: weight.shape for name, weight in last.items()} == {n: w.shape for n, w in start.items()}
    changes = {name: torch.from_numpy(last[name] - start[name]).double() for name in start}
    moved = {name for name, change in changes.items() if change.abs().max() > 0}
    assert moved == {name for name in start if "q_proj" in name or "down_proj" in name}
    for name in moved:
        values = torch.linalg.svdvals(changes[name])
        assert values[1] > 1e-9 and values[2] < 1e-4 * values[0], (name, values)
    expected = torch.stack([change.square().sum() for change in changes.values()]).sum().sqrt().item()
    found = run.recorder.rows[-1]["weight_norm"]
    print(f"norm of the change {found:.9f}, of the rounded sums {expected:.9f}")
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_checkpoint_is_an_adapter_of_peft_and_merges_to_its_bits(tmp_path: Path) -> None:
    run = adapted_run("sft_gold")
    sft_gold.train(run)
    folder = run.recorder.folder
    files = ["000001.safetensors", "000002.safetensors", "000004.safetensors", ADAPTER_CONFIG]
    assert sorted(path.name for path in folder.iterdir()) == files
    written = checkpoint(run, 4)
    assert {weight.shape.numel() for weight in written.values()} == {2 * 16, 2 * 32}  # in or out of the modules
    assert len(written) == 2 * 2 * len(LORA.modules)
    shutil.copyfile(folder / ADAPTER_CONFIG, tmp_path / ADAPTER_CONFIG)
    shutil.copyfile(checkpoint_file(folder, 4), tmp_path / ADAPTER_WEIGHTS)
    start = arrays(tiny_model())
    by_peft = arrays(load_adapter(tiny_model(), tmp_path).model)
    in_memory = arrays(merged(run.model))
    last = read_checkpoint(folder, 4, start)
    assert last.keys() == by_peft.keys() == in_memory.keys()
    for name, weight in last.items():
        assert np.array_equal(weight, by_peft[name]) and np.array_equal(weight, in_memory[name])
    assert any((weight != start[name]).any() for name, weight in last.items())


def test_the_config_of_a_run_is_the_same_bytes_each_time() -> None:
    """PEFT keeps the modules as a set, whose order differs between processes."""
    model = adapted_run("sft_gold").model
    assert adapters.adapter_config(model)["target_modules"] == ["down_proj", "q_proj"]


def test_adapters_of_another_base_are_refused() -> None:
    run = adapted_run("sft_gold")
    run.recorder.keep(1, gradient_steps=1, completions=0)
    base = arrays(tiny_model())
    del base["model.layers.1.self_attn.q_proj.weight"]
    with pytest.raises(RuntimeError, match="000001.safetensors and the base hold different parameters"):
        read_checkpoint(run.recorder.folder, 1, base)


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
