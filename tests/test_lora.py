"""Merging of adapters: exact in float64 for every family and kind of adapter, and never wrong without a word."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.modeling_utils import PreTrainedModel

from stages.circuits.lora import Merge, merge, merged
from stages.circuits.walker import Walker
from stages.pipeline.checkpoints import load_adapter, load_model
from stages.pipeline.stage import Invalid
from tests import oracles
from tests.oracles import hooked_logits, random_model, random_pairs

IDS = random_pairs().clean_ids
ATTENTION = {"gpt2": ["attn.c_attn", "attn.c_proj"], "gpt_neox": ["query_key_value", "dense"]}
EMBEDDING, HEAD = {"gpt2": "wte", "gpt_neox": "embed_in"}, "lm_head"
# what an adapter may be, as arguments of LoraConfig; "ends" are targeted besides attention
KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "on the head": {"ends": ["head"]},
    "on the embedding": {"ends": ["embedding"]},
    "on both": {"ends": ["head", "embedding"]},
    "on both, tied": {"ends": ["embedding"], "ensure_weight_tying": True},
    "dora on both": {"ends": ["head", "embedding"], "use_dora": True},
    "head saved whole": {"modules_to_save": ["head"]},
    "embedding saved whole": {"modules_to_save": ["embedding"]},
    "embedding saved whole, tied": {"modules_to_save": ["embedding"], "ensure_weight_tying": True},
    "single tokens": {"trainable_token_indices": [1, 5]},
}
UNTIES = {"on the head", "on the embedding", "on both", "dora on both", "head saved whole", "embedding saved whole"}


def model_of(kind: str, tied: bool, monkeypatch: pytest.MonkeyPatch, n_layers: int = 2) -> PreTrainedModel:
    model_class, config, settings = oracles.MODELS[kind]
    monkeypatch.setitem(oracles.MODELS, kind, (model_class, config, {**settings, "tie_word_embeddings": tied}))
    return random_model(kind, n_layers)


def adapt(model: PreTrainedModel, kind: str = "llama", *names: str, **settings: Any) -> PeftModel:
    """A PEFT model with adapters of these names, whose weights are random.

    Args:
        settings: of LoraConfig; "embedding" and "head" stand for the modules' names.
    """
    own = {"embedding": EMBEDDING.get(kind, "embed_tokens"), "head": HEAD}
    targets = ATTENTION.get(kind, ["q_proj", "v_proj", "o_proj"])
    settings = {"target_modules": targets + [own[end] for end in settings.pop("ends", [])], **settings}
    if "modules_to_save" in settings:
        settings["modules_to_save"] = [own[end] for end in settings["modules_to_save"]]
    config = LoraConfig(r=4, lora_alpha=8, **settings)
    first, *rest = names or ("default",)
    whole: Any = model
    adapted: Any = get_peft_model(whole, config, adapter_name=first)
    for name in rest:
        adapted.add_adapter(name, config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if any(part in name for part in ("lora_", "modules_to_save", "trainable_tokens")):
                weight.add_(0.3 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype))
    return adapted.eval()


def logits(model: Any) -> torch.Tensor:
    plain: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    return hooked_logits(plain, IDS)


@pytest.mark.parametrize("adapter", KINDS)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "gemma2", "gemma3", "gpt_neox"])
def test_the_merged_model_is_the_adapted_one(
    kind: str, tied: bool, adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = logits(model_of(kind, tied, monkeypatch))
    settings = {"fan_in_fan_out": True} if kind == "gpt2" and "ends" not in KINDS[adapter] else {}
    adapted = adapt(model_of(kind, tied, monkeypatch), kind, **KINDS[adapter], **settings)
    targets = set(adapted.targeted_module_names)
    expected = logits(adapted)
    done = merge(adapted)
    error = float((logits(done.model) - expected).abs().max())
    effect = float((expected - plain).abs().max())
    print(f"{kind} {adapter}: maximum error {error:.1e}, effect {effect:.1e}")
    assert error <= 1e-11 < 1e-2 < effect
    weights = [change.name for change in done.changes if change.name.endswith(".weight")]
    assert targets <= {name.removesuffix(".weight") for name in weights}
    assert all(0 < change.relative < 100 and change.adapters == ("default",) for change in done.changes)
    model: Any = done.model
    shared = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert shared is model.config.tie_word_embeddings is (tied and not done.untied)
    if adapter in UNTIES:
        assert done.untied is tied
    assert all(weight.requires_grad for weight in done.model.parameters())
    assert merge(done.model) == Merge(done.model, (), (), False)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_untied_model_is_saved_with_both_matrices(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapted = adapt(model_of(kind, True, monkeypatch), kind, ends=["head"])
    expected = logits(adapted)
    merged(adapted).save_pretrained(tmp_path)
    again: Any = load_model(tmp_path)
    with torch.no_grad():
        error = float((again(input_ids=IDS).logits[:, -1] - expected).abs().max())
    print(f"maximum error {error:.1e} of {float(expected.abs().max()):.1e}")
    assert error < 1e-3 and again.config.tie_word_embeddings is False


def test_which_adapters_are_merged_is_never_guessed() -> None:
    one: Any = adapt(random_model("llama"), "llama", "a", "b")
    both: Any = adapt(random_model("llama"), "llama", "a", "b")
    with pytest.raises(Invalid, match=r"carries the adapters a, b, of which b is not active: say which .*adapters="):
        merge(one)
    with pytest.raises(Invalid, match="adapters: 'c' must be one of a, b"):
        merge(one, ["a", "c"])
    with pytest.raises(Invalid, match="adapters is empty"):
        merge(one, [])
    one.set_adapter("b")
    of_b = logits(one)
    one.set_adapter("a")
    done = merge(one, ["b"])
    assert done.adapters == ("b",) and {change.adapters for change in done.changes} == {("b",)}
    assert float((logits(done.model) - of_b).abs().max()) <= 1e-12
    both.base_model.set_adapter(["a", "b"])
    expected = logits(both)
    done = merge(both)
    error = float((logits(done.model) - expected).abs().max())
    print(f"both: maximum error {error:.1e}, beside b alone {float((expected - of_b).abs().max()):.1e}")
    assert error <= 1e-12 and {change.adapters for change in done.changes} == {("a", "b")}
    assert float((expected - of_b).abs().max()) > 1e-2


def test_two_dora_adapters_at_once_are_exact() -> None:
    """Each scales the columns of the base, so the order of merging could matter."""
    adapted: Any = adapt(random_model("llama"), "llama", "a", "b", use_dora=True)
    adapted.base_model.set_adapter(["a", "b"])
    expected = logits(adapted)
    error = float((logits(merged(adapted)) - expected).abs().max())
    print(f"maximum error {error:.1e}")
    assert error <= 1e-12


def test_what_weights_cannot_hold_is_refused() -> None:
    """A hook on an adapter layer goes with the layer."""
    adapted: Any = adapt(random_model("llama"))
    layer = adapted.get_submodule("base_model.model.model.layers.1.self_attn.v_proj")
    layer.register_forward_hook(lambda module, args, output: 1.1 * output)
    with pytest.raises(Invalid, match="merged and unmerged model differ by .* of the largest logit"):
        merge(adapted)


def test_adapters_that_are_off_or_merged_already(monkeypatch: pytest.MonkeyPatch) -> None:
    adapted: Any = adapt(random_model("llama"))
    expected = logits(adapted)
    adapted.base_model.disable_adapter_layers()
    with pytest.raises(Invalid, match="the adapters of the model are switched off"):
        merge(adapted)
    assert float((logits(merged(adapted, ["default"])) - expected).abs().max()) <= 1e-12
    for kind in ("on the head", "dora"):  # PEFT itself merges the first into the embedding, too
        adapted = adapt(model_of("llama", True, monkeypatch), **KINDS[kind])
        expected = logits(adapted)
        adapted.merge_adapter()
        done = merge(adapted)
        error = float((logits(done.model) - expected).abs().max())
        print(f"{kind}: maximum error {error:.1e}")
        assert error <= 1e-11 and min(change.relative for change in done.changes) > 1e-2


def test_a_hugging_face_model_with_adapter_layers_inside_is_merged(tmp_path: Path) -> None:
    random_model("llama").save_pretrained(tmp_path / "base")
    adapt(random_model("llama")).save_pretrained(str(tmp_path / "adapter"))
    model: Any = load_model(tmp_path / "base")
    model.load_adapter(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        plain: Any = merged(model)
        found = plain(input_ids=IDS).logits
    error = float((found - expected).abs().max())
    print(f"maximum error {error:.1e}")
    assert error < 1e-4 and Walker(model)
    model.save_pretrained(tmp_path / "merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    for layers in (3, 5):
        random_model("llama", layers).save_pretrained(tmp_path / f"base{layers}")
        adapt(random_model("llama", layers)).save_pretrained(str(tmp_path / f"adapter{layers}"))
    with pytest.raises(Invalid, match=r"adapter '.*adapter3' does not fit .* no weights for model.layers.3.self_attn"):
        load_model(tmp_path / "base5", adapter=tmp_path / "adapter3")
    with pytest.raises(Invalid, match=r"adapter5' does not fit .* holds weights for model.layers.3.*the base lacks"):
        load_model(tmp_path / "base3", adapter=tmp_path / "adapter5")
    base: Any = load_model(tmp_path / "base5")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter3"))
    with pytest.raises(
        Invalid, match="6 of 15 targeted matrices stay as they were, the first model.layers.3.self_attn"
    ):
        merge(loaded)
    for kind, sentence in (("llama_gqa", "size mismatch"), ("gpt2", "Target modules")):
        random_model(kind).save_pretrained(tmp_path / kind)
        with pytest.raises(Invalid, match=f"adapter3' does not fit its base: .*{sentence}"):
            load_model(tmp_path / kind, adapter=tmp_path / "adapter3")


@pytest.mark.parametrize("adapter", ["dora", "on the head", "embedding saved whole", "single tokens"])
def test_a_folder_with_an_adapter_is_loaded_with_its_base(
    adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_of("llama", True, monkeypatch, 3).save_pretrained(tmp_path / "base", max_shard_size="10KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 1  # in shards
    base: Any = load_model(tmp_path / "base")
    adapted = adapt(base, **KINDS[adapter])
    assert adapted.active_peft_config.base_model_name_or_path == str(tmp_path / "base")
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(input_ids=IDS).logits
        for found in (
            load_model(tmp_path / "adapter"),
            load_model(tmp_path / "base", adapter=tmp_path / "adapter"),
            load_adapter(load_model(tmp_path / "base"), tmp_path / "adapter").model,
        ):
            error = float((found(input_ids=IDS).logits - expected).abs().max())
            print(f"maximum error {error:.1e}")
            assert error < 1e-4 and found.dtype == torch.float32 and not found.training


def test_folders_that_cannot_be_loaded(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    random_model("llama").save_pretrained(base)
    adapted: Any = adapt(load_model(base))
    adapted.save_pretrained(str(adapter))
    with pytest.raises(Invalid, match=r"folder '.*adapter' is an adapter, too: .* needs a whole model"):
        load_model(adapter, adapter=adapter)
    both = shutil.copytree(base, tmp_path / "both")
    for file in adapter.iterdir():
        shutil.copy(file, both)
    with pytest.raises(Invalid, match="both' holds a model and an adapter"):
        load_model(both)
    base.rename(tmp_path / "gone")
    with pytest.raises(Invalid, match=rf"adapter '{adapter}' needs its base '{base}', which is not there.*load_model"):
        load_model(adapter)
    assert load_model(tmp_path / "gone", adapter=adapter)
    with pytest.raises(Invalid, match=rf"model '{base}', which adapter '{adapter}' needs, is missing"):
        load_model(base, adapter=adapter)
    with pytest.raises(Invalid, match=rf"model '{base}' is missing: must be a folder, or a model on the hub"):
        load_model(base)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(Invalid, match="names no base: give it, load_model"):
        load_model(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    torch.save({}, adapter / "adapter_model.bin")
    with pytest.raises(Invalid, match="holds no adapter_model.safetensors; only adapters with safetensors"):
        load_model(tmp_path / "gone", adapter=adapter)
    model = load_model(tmp_path / "gone")
    (tmp_path / "gone/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "gone/pytorch_model.bin")
    with pytest.raises(Invalid, match="holds no .safetensors file"):
        load_model(tmp_path / "gone")


def test_models_and_adapters_on_the_hub(tmp_path: Path) -> None:
    """In the layout of the hub's own cache, which is asked first; nothing is fetched here."""

    def cached(name: str, model: Any, revision: str) -> None:
        repository = tmp_path / f"hub/models--{name.replace('/', '--')}"
        model.save_pretrained(repository / "snapshots" / revision)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs/main").write_text(revision)

    cached("owner/base", random_model("llama", seed=1), "b" * 40)
    cached("owner/base", random_model("llama"), "a" * 40)
    adapted: Any = adapt(random_model("llama"))
    adapted.active_peft_config.base_model_name_or_path = "owner/base"
    cached("owner/adapter", adapted, "c" * 40)
    shutil.copytree(tmp_path / f"hub/models--owner--adapter/snapshots/{'c' * 40}", tmp_path / "adapter")
    merged(adapted)
    code = """
import torch
from stages.pipeline.checkpoints import load_model
from stages.pipeline.stage import Invalid
def weight(*model, **rest):
    return round(float(load_model(*model, **rest).model.layers[0].self_attn.q_proj.weight[0, 0]), 5)
print(weight("owner/base"), weight("owner/base", revision="b" * 40))
print(weight("adapter"), weight("owner/base", "owner/adapter"))
for wrong in (["owner/nothing"], ["owner/base", "owner/nothing"], ["owner/base", None, "d" * 40]):
    try:
        load_model(*wrong)
    except Invalid as error:
        print(error)
"""
    path = os.pathsep.join([str(Path.cwd()), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub"), "PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(run.stdout, run.stderr)
    *weights, first_sentence, second, third = run.stdout.splitlines()

    def first(model: Any) -> float:
        return round(float(model.model.layers[0].self_attn.q_proj.weight[0, 0]), 5)

    expected = [
        first(random_model("llama")),
        first(random_model("llama", seed=1)),
        *[first(adapted.get_base_model())] * 2,
    ]
    assert [float(text) for text in " ".join(weights).split()] == pytest.approx(expected, abs=2e-5)
    assert all("cannot be had from the hub" in sentence for sentence in (first_sentence, second, third))
    assert "adapter 'owner/nothing'" in second and f"at revision {'d' * 40}" in third
