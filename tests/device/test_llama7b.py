"""Preset `llama7b` with random weights of that shape in small: architecture, kind of tokenizer, an adapter.

From model folders through import, discovery, evaluation, masks and transplants to the report, by the stages themselves;
no model is trained.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from stages import (
    cmap,
    contrast,
    dcm,
    discover,
    drift,
    evaluate,
    finetune,
    match,
    matchings,
    pretrain,
    report,
    source,
    synthesize,
)
from stages.pipeline.checkpoints import load_model, load_tokenizer, save_model
from stages.pipeline.overrides import compose
from stages.pipeline.params import load_params
from stages.pipeline.resources import Resources
from stages.pipeline.stage import Cell, Invalid
from stages.tasks.vocabulary import LABELS, OBJECTS
from tests.comparing import record_difference
from tests.conftest import REPOSITORY
from tests.device.second_device import DEVICE, second_device
from tests.small_llama import PRESET, SIZES, prepare, small_llama

SMALL = [
    *SIZES,
    "new_task=adjacent",  # of one-token answers, as the tokenizer is too small to say sums
    "arms=[goat,float7b]",
    "finetune.goat={import: theirs, adapter: goat, revision: null}",
    "finetune.float7b={import: full, adapter: null, revision: null}",
    "contrast.contrasts=[[goat,float7b]]",
]
ARMS = ("goat", "float7b")
GOAT = {"arm": "goat", "seed": "0", "learning_rate": "0.0003"}
ANALYSES = {discover: "model", evaluate: "model", dcm: "model", cmap: "arm"}


def llama_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: byte-pair encoding with byte fallback, spaces as part of words, a beginning before every text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=1400, special_tokens=special, show_progress=False)
    draw = np.random.default_rng(0)
    words = ["The", "the", "is", "in", "Box", "contains", "borders", "lacks", "precedes", *OBJECTS, *LABELS]
    words += ["Box"] * 20
    texts = [" ".join(draw.permutation(words)) for _ in range(30)]
    texts = [piece for text in texts for piece in text.split(" ")]  # no merge over a space, as in Llama's
    tokenizer.train_from_iterator([*texts, *([",", "."] * 30)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with the data, the base, and two tuned models in folders of their own: an adapter as Goat-7B's,
    and all weights as FLoat-7B's."""
    folder = tmp_path_factory.mktemp("llama7b")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        tokenizer = llama_tokenizer()
        save_model(small_llama(len(tokenizer)), tokenizer, "theirs")
        adapted: Any = get_peft_model(
            load_model("theirs"),
            LoraConfig(
                r=4, lora_alpha=4, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], task_type="CAUSAL_LM"
            ),
        )
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora_B" in name:
                    weight.copy_(0.1 * torch.randn(weight.shape))
        adapted.save_pretrained("goat")
        full = load_model("theirs")
        with torch.no_grad():
            for weight in full.parameters():
                weight.add_(0.01 * torch.randn(weight.shape))
        save_model(full, tokenizer, "full")
        shutil.copy(REPOSITORY / "dvc.yaml", "dvc.yaml")
        prepare(patch, SMALL)
        source.main(Cell("source", {}))
        synthesize.main(Cell("synthesize", {}))
        patch.setattr(pretrain, "FEWER", 4)
        pretrain.main(Cell("pretrain", {"seed": "0"}))
        for module in (finetune, match):
            for arm in ARMS:
                item = {"arm": arm, "seed": "0"} | ({"learning_rate": "0.0003"} if module is finetune else {})
                module.main(Cell(module.__name__.rpartition(".")[2], item))
    return folder


def analysed(patch: pytest.MonkeyPatch, available: Resources, arms: tuple[str, ...]) -> dict[str, Any]:
    """The records of all analyses of the base and tuned models."""
    found = {}
    for module, axis in ANALYSES.items():
        name = module.__name__.rpartition(".")[2]
        shutil.rmtree(f"reports/cells/{name}", ignore_errors=True)
        patch.setattr(module, "resources", lambda: available)
        for model in ("base", *arms) if axis == "model" else arms:
            module.main(Cell(name, {axis: model, "seed": "0"}))
        found |= {
            str(path): json.loads(path.read_text()) for path in sorted(Path("reports/cells", name).rglob("*.json"))
        }
    return found


def test_the_preset_says_what_the_paper_did(tmp_path: Path) -> None:
    target = tmp_path / "params.yaml"
    compose(REPOSITORY / "params.yaml", target, PRESET, [])
    params: Any = load_params(target)
    assert params.discover.hops == "paper" and list(params.discover.paper_top.receivers) == [20, 5, 10, 5]
    assert params.source.model == "huggyllama/llama-7b" and params.teach is None
    second = [line.strip("# \n\\") for line in PRESET.read_text().splitlines() if "-S discover" in line]
    changes = [word for line in second for word in line.split() if word.startswith("discover.")]
    compose(REPOSITORY / "params.yaml", target, PRESET, changes)
    params = load_params(target)
    assert params.discover.hops == "auto" and params.discover.paper_top is None and len(changes) == 4


def test_an_adapter_is_merged_and_the_chain_runs_to_the_end(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(imported)
    ids = load_tokenizer("models/source")(" the drink is in Box Q", add_special_tokens=False)["input_ids"]
    print(load_tokenizer("models/source").convert_ids_to_tokens(ids))
    base, tuned = (load_model(f"models/{name}/0").state_dict() for name in ("base", "goat"))
    moved = {name.split(".")[-2] for name in base if not torch.equal(base[name], tuned[name])}
    assert moved == {"q_proj", "k_proj", "v_proj", "o_proj"}, "merged into the weights"
    prepare(monkeypatch, SMALL)
    here = analysed(monkeypatch, Resources(1, 512.0), ("goat",))
    record = here["reports/cells/discover/base/0/record.json"]
    assert set(record["sizes"]) == {"value_fetcher", "pos_transmitter", "pos_detector", "struct_reader"}
    assert here["reports/cells/evaluate/goat/0.json"]["circuit"]["size"] == record["size"] > 0
    assert set(here["reports/cells/dcm/base/0.json"]["groups"]) == set(record["sizes"])
    both = here["reports/cells/cmap/goat/0.json"]
    assert both["base"]["logit_difference"] != both["tuned"]["logit_difference"]

    with second_device() as device:
        there = analysed(monkeypatch, Resources(1, 512.0, device), ("goat",))
    for path, record in there.items():
        if "settings" in record:
            assert record["settings"].pop("device") == DEVICE.type, path
    error = record_difference(there, here)
    print(f"on another device: max error {error:.1e}")
    assert error < 1e-3, "in float32"


def test_imported_arms_are_reported(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(imported)
    prepare(monkeypatch, SMALL)
    analysed(monkeypatch, Resources(1, 512.0), ARMS)
    for module in (matchings, drift):
        for arm in ARMS:
            module.main(Cell(module.__name__.rpartition(".")[2], {"arm": arm, "seed": "0"}))
    contrast.main(Cell("contrast", {}))
    report.main(Cell("report", {}))
    record = json.loads(Path("reports/cells/match/goat/0.json").read_text())
    assert record["reached"] and record["step"] is None and record["rule"].startswith("imported")
    assert sum(entry["reached"] for entry in record["matchings"].values()) == 1, "at no matching but as it is"
    sentence = json.loads(Path("reports/summary.json").read_text())["headline"]["sentence"]
    print(sentence)
    assert "same skill" not in sentence
    assert "goat" in Path("reports/report.md").read_text()


def test_what_the_base_could_not_have_become_is_no_arm(imported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(imported)
    tokenizer = load_tokenizer("models/source")
    save_model(small_llama(len(tokenizer) - 3), tokenizer, "smaller")
    broken = small_llama(len(tokenizer))
    broken.lm_head.weight.data[3, 4] = float("nan")
    save_model(broken, tokenizer, "broken")
    Path("pickled").mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("theirs", name), "pickled")
    torch.save({}, "pickled/pytorch_model.bin")
    for name in ("incomplete", "truncated", "unnamed", "turned", "regrouped"):
        shutil.copytree("theirs", name, dirs_exist_ok=True)
    weights = load_file("theirs/model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, "incomplete/model.safetensors", metadata={"format": "pt"})
    Path("truncated/model.safetensors").write_bytes(Path("theirs/model.safetensors").read_bytes()[:50_000])
    Path("unnamed/config.json").unlink()
    config = json.loads(Path("theirs/config.json").read_text())
    for name, change in {
        "turned": {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        "regrouped": {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 4},
    }.items():
        Path(name, "config.json").write_text(json.dumps(config | change))
    before = sorted(Path("models").rglob("*"))
    for folder, sentence in {
        "smaller": r"vocab_size = \d+ in its config, that of the base has \d+",
        "broken": "lm_head.weight holds numbers that are not finite",
        "pickled": "holds no .safetensors file; only safetensors weights are loaded",
        "incomplete": "has no weights for model.layers.1.mlp.up_proj.weight",
        "truncated": "model folder 'truncated' cannot be loaded: Error while deserializing header",
        "unnamed": "model folder 'unnamed' cannot be loaded: Unrecognized model",
        "turned": r"rope_parameters = .*500.0.* in its config, that of the base has",
        "regrouped": "head_dim = 4 in its config, that of the base has 8",
        "gone": "model 'gone' is missing: must be a folder, or a model on the hub",
        "owner/name": "cannot be had from the hub",
    }.items():
        prepare(monkeypatch, [*SMALL, f"finetune.goat.import={folder}", "finetune.goat.adapter=null"])
        with pytest.raises(Invalid, match=f"^finetune.goat.import = '{folder}': .*{sentence}") as caught:
            finetune.main(Cell("finetune", GOAT))
        print(caught.value)
        assert "\n" not in str(caught.value)
    prepare(monkeypatch, [*SMALL, "finetune.goat.revision=v2"])
    with pytest.raises(Invalid, match=r"finetune.goat.revision = 'v2': must be null where a folder is imported"):
        finetune.main(Cell("finetune", GOAT))
    assert sorted(Path("models").rglob("*")) == before, "nothing is written"
