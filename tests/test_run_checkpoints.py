"""Checkpoints on disk: written at once, whole or not at all, and with no more in memory for more of them."""

import json
import tracemalloc
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from stages import finetune, match
from stages.learning import adapters
from stages.learning import run as run_module
from stages.learning.arms import noise, sft_gold
from stages.learning.checkpoints import checkpoint_file, read_checkpoint, set_weights, stored_weights
from stages.learning.matching import distance, moved_as_far
from stages.learning.probes import Probe
from stages.learning.run import Recorder, Run
from stages.learning.schedule import checkpoint_steps
from stages.pipeline.checkpoints import load_model, save_model
from stages.tasks.examples import write_examples, write_prompts
from tests.live_bytes import LiveBytes
from tests.test_adapters import adapted_run, arrays
from tests.test_learning import (
    TRAINING,
    FakeCell,
    invented_curve,
    new_folder,
    tiny_examples,
    tiny_model,
    tiny_prompts,
    tiny_run,
    tiny_tokenizer,
)

WIDE_LORA: Any = SimpleNamespace(rank=64, alpha=64, modules=("q_proj", "down_proj"))


def wide_model(lora: bool = False) -> Any:
    """Its weights, and those of its adapters, are much more than what a few short prompts make of them."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=43, hidden_size=128, intermediate_size=256, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    return adapters.with_adapters(model, WIDE_LORA, seed=0) if lora else model


def wide_run(lora: bool, every: int) -> Run:
    """12 steps with a checkpoint every so many."""
    training = replace(TRAINING, steps=12, dense_until=12, dense_every=every)
    run, model = tiny_run("sft_gold", training=training), wide_model(lora)
    probe = Probe.of(model, tiny_examples(), run.train)
    recorder = Recorder(model, probe, checkpoint_steps(training), lambda step, row: None, run.recorder.folder)
    return replace(run, model=model, watcher=recorder)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_more_checkpoints_take_no_more_memory(lora: bool) -> None:
    peaks, size = {}, 0
    for every in (6, 1):
        run = wide_run(lora, every)
        with LiveBytes(*run.model.parameters(), *run.recorder.probe.base_weights.values()) as live:
            sft_gold.train(run)
        files = sorted(run.recorder.folder.glob("*.safetensors"))
        assert len(files) == 12 // every
        peaks[every] = live.peak
        size = sum(weight.nbytes for weight in load_file(files[0]).values())
    print(f"peak {peaks[6]} bytes with 2 checkpoints of {size}, {peaks[1]} with 12")
    assert peaks[1] < peaks[6] + size / 2


def two(of: Any) -> Any:
    return of.select(torch.arange(2))


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_checkpoint_is_written_and_scored_without_a_copy_of_the_model(lora: bool) -> None:
    model = wide_model(lora)
    size = sum(weight.nbytes for weight in model.parameters())
    prompts = tiny_prompts(2)
    with LiveBytes(*model.parameters()) as live:
        probe = Probe.of(model, two(tiny_examples()), prompts)
    kept = sum(weight.nbytes for weight in probe.base_weights.values())
    assert kept == (0 if lora else size) and live.peak < kept + size / 4
    recorder = Recorder(model, probe, (1,), lambda step, row: None, new_folder())
    with LiveBytes(*model.parameters(), *probe.base_weights.values()) as live:
        recorder.keep(1, gradient_steps=1, completions=0)
    print(f"{live.peak} bytes of a model of {size}")
    assert live.peak < size / 4


def test_a_checkpoint_that_fails_leaves_no_file(monkeypatch: pytest.MonkeyPatch) -> None:
    run = tiny_run("sft_gold")

    def half(weights: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    run.recorder.keep(1, gradient_steps=1, completions=0)
    monkeypatch.setattr(run_module, "save_file", half)
    with pytest.raises(OSError, match="no space left"):
        run.recorder.keep(2, gradient_steps=2, completions=0)
    assert [path.name for path in run.recorder.folder.iterdir()] == ["000001.safetensors"]


def test_a_run_that_fails_leaves_the_output_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After its first checkpoint is written; the stage's output is whole or absent."""
    prepare(tmp_path, monkeypatch)
    params = {"finetune.common": vars(TRAINING), "new_task": "adjacent"}
    for scales, written in (([0.1, 0.2], 2), ([0.1, 0.3, None], 2)):
        params["finetune.noise"] = SimpleNamespace(scales=scales, trained=False)
        failing = pytest.raises(TypeError) if None in scales else nullcontext()
        with failing:
            finetune.main(FakeCell("finetune", {"arm": "noise", "seed": "5", "learning_rate": "0.001"}, params))
        assert [path.name for path in Path("models/runs/noise/5").iterdir()] == ["0.001"]
        assert len(list(Path("models/runs/noise/5/0.001").iterdir())) == written


def test_weights_are_read_one_tensor_at_a_time(tmp_path: Path) -> None:
    base, tuned, size = wide_model(), wide_model(), 0
    with torch.no_grad():
        for weight in tuned.parameters():
            weight.add_(torch.randn_like(weight))
            size += weight.nbytes
    for step, model in enumerate((base, tuned)):
        save_file({n: w.detach() for n, w in model.named_parameters()}, checkpoint_file(tmp_path, step))
    start = stored_weights(checkpoint_file(tmp_path, 0))
    tracemalloc.start()
    try:
        found = read_checkpoint(tmp_path, 1, start)
        norm, same = distance(start, found), distance(start, moved_as_far(start, found, found))
        set_weights(base, found)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    print(f"peak {peak} bytes of a model of {size}")
    assert peak < size / 2
    assert norm == pytest.approx(same, rel=1e-6) and norm > 0
    assert all(torch.equal(a, b) for a, b in zip(base.parameters(), tuned.parameters(), strict=True))
    with pytest.raises(RuntimeError, match="other names than the parameters"):
        set_weights(tiny_model(), {"lm_head.weight": np.zeros((43, 16), np.float32)})


def test_a_base_in_several_files_and_in_bfloat16_is_read_in_float32(tmp_path: Path) -> None:
    weights = {name: weight.detach().bfloat16() for name, weight in tiny_model().named_parameters()}
    names = list(weights)
    for number, part in enumerate((names[:5], names[5:])):
        save_file({name: weights[name] for name in part}, tmp_path / f"model-{number}.safetensors")
    found = stored_weights(*sorted(tmp_path.glob("*.safetensors")))
    assert found.keys() == weights.keys()
    assert all(np.array_equal(found[name], weight.float().numpy()) for name, weight in weights.items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_a_matrix_that_embedding_and_head_share_is_kept_once(lora: bool, tmp_path: Path) -> None:
    model: Any = tiny_model()
    model.lm_head.weight, model.config.tie_word_embeddings = model.model.embed_tokens.weight, True
    save_model(model, tiny_tokenizer(), tmp_path / "base")
    start, tuned = stored_weights(tmp_path / "base/model.safetensors"), load_model(tmp_path / "base")
    trained: Any = adapters.with_adapters(tuned, WIDE_LORA, seed=0) if lora else tuned
    probe = Probe.of(trained, tiny_examples(), tiny_prompts())
    recorder = Recorder(trained, probe, (1,), lambda step, row: None, tmp_path / "lr0")
    with torch.no_grad():
        for weight in trained.parameters():
            if weight.requires_grad:
                weight.add_(0.1 * torch.randn_like(weight))
    recorder.keep(1, gradient_steps=1, completions=0)
    found, plain = read_checkpoint(tmp_path / "lr0", 1, start), load_model(tmp_path / "base")
    assert "lm_head.weight" not in found
    set_weights(plain, found)
    head: Any = plain.get_output_embeddings()
    assert head.weight is plain.get_input_embeddings().weight
    ids = tiny_prompts().input_ids
    with torch.no_grad():
        error = (plain(input_ids=ids).logits - trained(input_ids=ids).logits).abs().max().item()
    print(f"maximum error {error:.1e}")
    assert error < 1e-4
    assert distance(start, found) == pytest.approx(recorder.rows[-1]["weight_norm"], rel=1e-5)


def prepare(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base and the data of stages `finetune` and `match`, in a folder that is now the working directory."""
    monkeypatch.chdir(folder)
    save_model(tiny_model(), tiny_tokenizer(), "models/base/5")
    for name in ("new/adjacent/train", "new/adjacent/selection", "old/train"):
        path = Path(f"data/{name}.parquet")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_prompts(path, tiny_prompts())
    write_examples(Path("data/old/selection.parquet"), tiny_examples())


def test_matched_models_of_adapters_are_plain_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of an arm with adapters, and of noise, which moves the weights themselves as far."""
    prepare(tmp_path, monkeypatch)
    Path("data/tasks.json").write_text(json.dumps({"new_tasks": {"adjacent": {"shortcuts": {"any_object": 0.1}}}}))
    tuned = adapted_run("sft_gold", folder=Path("models/runs/sft_gold/5/0.01"))
    sft_gold.train(tuned)
    section = SimpleNamespace(scales=[0.1, 0.2])
    twin = tiny_run("noise", 0.0, section, folder=Path("models/runs/noise/5/0.01"))
    noise.train(twin)
    for arm, run in (("sft_gold", tuned), ("noise", twin)):
        invented_curve(arm, 1e-2, run.learning_rate, run)
    settings = {"level": 0.35, "learning_rate": 1e-2, "confirm": 1, "like": "sft_gold", "shams": ("noise",)}
    settings |= {"levels": (0.35,), "kl": (), "norm": (3.0,), "steps": ()}
    for arm in ("sft_gold", "noise"):
        params = {"match": SimpleNamespace(**settings), "new_task": "adjacent", "learning_rates": [1e-2]}
        params |= {"finetune.common.warmup_steps": 0}
        match.main(FakeCell("match", {"arm": arm, "seed": "5"}, params))
    start = arrays(tiny_model())
    picked, later = Path("models/sft_gold/5"), Path("models/matched/5/sft_gold/0.01")
    assert sorted(file.name for file in picked.glob("*.safetensors")) == ["adapter_model.safetensors"], "adapters alone"
    whole = {name: weight.detach().numpy() for name, weight in load_model(picked).named_parameters()}
    for step, found, file in (
        (2, whole, "models/noise/5/model.safetensors"),
        (4, read_checkpoint(later, 4, start), "models/matched/5/noise/0.01/000004.safetensors"),
    ):
        of_run, moved = read_checkpoint(tuned.recorder.folder, step, start), stored_weights(Path(file))
        assert found.keys() == moved.keys() == start.keys()
        assert all(np.array_equal(found[name], of_run[name]) for name in start)
        for name, weight in start.items():
            far = float(np.linalg.norm(found[name] - weight))
            assert float(np.linalg.norm(moved[name] - weight)) == pytest.approx(far, rel=1e-3)
    record = json.loads(Path("reports/cells/match/sft_gold/5.json").read_text())
    assert record["weight_norm"] == pytest.approx(tuned.recorder.rows[2]["weight_norm"], rel=1e-5)
    ids = tiny_prompts().input_ids
    with torch.no_grad():
        assert torch.isfinite(load_model("models/sft_gold/5")(input_ids=ids).logits).all()
