"""Loading a model of one's own, and the names that the engine offers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import stages.circuits as engine
from stages.circuits import Circuit, load
from stages.circuits.walker import Walker
from stages.pipeline.stage import Invalid

IDS = torch.tensor([[1, 5, 2, 7, 3]])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small random model in bfloat16, with a tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=12,
        initializer_range=0.3,
    )
    model: Any = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(12)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_in_float32_whatever_it_holds(folder: Path) -> None:
    walker, tokenizer = load(folder)
    assert isinstance(walker, Walker) and walker.dtype == torch.float32
    assert walker.model.config._attn_implementation == "eager" and not walker.model.training
    assert not any(weight.requires_grad for weight in walker.model.parameters())
    assert tokenizer("w3 w5")["input_ids"] == [3, 5]
    with torch.no_grad():
        expected = walker.model(IDS).logits[:, -1]
    torch.testing.assert_close(walker.run(IDS).logits, expected, rtol=0, atol=1e-5)
    assert load(folder, dtype=torch.float64)[0].dtype == torch.float64


def test_an_adapter_is_merged(folder: Path, tmp_path: Path) -> None:
    plain = load(folder)[0].model
    adapted = get_peft_model(plain, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(str(tmp_path / "adapter"))
    with torch.no_grad():
        expected = adapted(IDS).logits[:, -1]
    walker = load(folder, adapter=tmp_path / "adapter")[0]
    torch.testing.assert_close(walker.run(IDS).logits, expected, rtol=0, atol=1e-5)
    assert float((load(folder)[0].run(IDS).logits - expected).abs().max()) > 1e-2
    with pytest.raises(Invalid, match="adapter 'no/adapter' is no folder, nor one that was downloaded"):
        load(folder, adapter="no/adapter")


def test_a_name_on_the_hub_is_what_was_downloaded_before(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, repository = "0" * 40, tmp_path / "hub" / "models--me--mine"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).symlink_to(folder, target_is_directory=True)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    of_hub, of_folder = load("me/mine")[0], load(folder)[0]
    assert torch.equal(of_hub.run(IDS).logits, of_folder.run(IDS).logits)
    for name, revision in (("me/other", None), ("me/mine", "v2"), ("../no/such folder", None)):
        with pytest.raises(Invalid, match="is no folder, nor one that was downloaded from the hub before: to download"):
            load(name, revision=revision)


def test_weights_that_are_not_safetensors_are_refused(folder: Path) -> None:
    torch.save(load(folder)[0].model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(Invalid, match="holds no .safetensors file"):
        load(folder)


def test_a_model_without_its_tokenizer_is_refused(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(Invalid, match="the tokenizer of '.*' cannot be had: "):
        load(folder)


def test_every_name_that_the_engine_offers_is_there() -> None:
    assert set(engine.__all__) <= set(dir(engine))
    for name in engine.__all__:
        assert getattr(engine, name).__name__ == name and (getattr(engine, name).__doc__ or "").strip()
    with pytest.raises(AttributeError, match="has no attribute 'everything'"):
        _ = engine.everything
    assert Circuit((), 2, 2).nodes == ()


def test_one_module_of_the_engine_loads_no_other() -> None:
    program = (
        "import sys, stages.circuits.circuit\n"
        "print(sorted(name for name in sys.modules if name.startswith('stages.') and name.count('.') == 2))\n"
        "from stages.circuits import find_circuit\n"
        "print(callable(find_circuit), [room for room in ('measures', 'figures') if f'stages.{room}' in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    loaded, after = result.stdout.splitlines()
    engine_modules = [name for name in eval(loaded) if not name.startswith("stages.pipeline.")]
    assert engine_modules == ["stages.circuits.circuit"] and after == "True []"
