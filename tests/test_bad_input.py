"""Models, adapters and tokenizers that do not fit, given to the command line of the stages before any training.

Each ends in one sentence and status 2, and nothing is written.
"""

import http.server
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

from stages import source, synthesize
from stages.learning.importing import bring
from stages.pipeline import hub, stage
from stages.pipeline.checkpoints import load_model, load_tokenizer, save_model
from stages.pipeline.overrides import compose
from stages.pipeline.params import load_params
from stages.pipeline.params.finetuning import Imported
from stages.pipeline.stage import Cell
from tests.conftest import REPOSITORY
from tests.test_any_tokenizer import STARTS, split_words_tokenizer
from tests.test_recipes import SIZES


def base(model: str = "theirs", adapter: str = "null") -> list[str]:
    return [f"source={{kind: hub, model: {model}, revision: null, adapter: {adapter}, bos: null}}"]


def arm(model: str, adapter: str = "null") -> list[str]:
    named = ["arms=[theirs,sft_gold]", "contrast.contrasts=[[theirs,sft_gold]]"]
    return [*base(), f"+finetune.theirs={{import: {model}, adapter: {adapter}, revision: null}}", *named]


def tiny(tokens: int, **sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    return LlamaForCausalLM(LlamaConfig(vocab_size=tokens, bos_token_id=0, eos_token_id=0, **settings | sizes))


def bytes_alone() -> PreTrainedTokenizerFast:
    """One that has no word as one token."""
    alphabet = [STARTS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=STARTS, eos_token=STARTS)


def edited(folder: str, name: str, edit: Callable[[Any], Any]) -> None:
    """A copy of a folder in which a JSON file is changed."""
    shutil.copytree("theirs", folder)
    path = Path(folder, name)
    path.write_text(json.dumps(edit(json.loads(path.read_text()))))


def swapped(tokenizer: Any) -> Any:
    """Two words with each other's ids, as after a tokenizer was trained anew."""
    ids = tokenizer["model"]["vocab"]
    ids["Ġlamp"], ids["Ġring"] = ids["Ġring"], ids["Ġlamp"]
    return tokenizer


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base that is whole, `theirs`, and with all that is wrong."""
    root = tmp_path_factory.mktemp("bad")
    shutil.copy(REPOSITORY / "dvc.yaml", root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = split_words_tokenizer()
        save_model(tiny(len(words)), words, "theirs")
        save_model(tiny(len(words) + 2), split_words_tokenizer(("follows", "trails")), "more_words")
        save_model(tiny(len(words) - 3), words, "fewer_rows")
        save_model(tiny(len(words), num_hidden_layers=3), words, "deeper")
        padded = split_words_tokenizer()
        padded.add_special_tokens({"pad_token": "<pad>"})
        save_model(tiny(len(words) + 1), padded, "padded")
        broken: Any = tiny(len(words))
        broken.model.layers[1].mlp.up_proj.weight.data[2, 3] = float("nan")
        save_model(broken, words, "broken")
        torch.manual_seed(0)
        mamba = MambaForCausalLM(MambaConfig(vocab_size=len(words), hidden_size=16, num_hidden_layers=1, state_size=4))
        save_model(mamba, words, "mamba")
        edited("swapped", "tokenizer.json", swapped)
        edited(
            "regrouped",
            "config.json",
            lambda config: config | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8},
        )
        for name, file in (("pickled", "pytorch_model.bin"), ("disguised", "model.safetensors")):
            shutil.copytree("theirs", name)
            Path(name, "model.safetensors").unlink()
            torch.save(load_model("theirs").state_dict(), Path(name, file))
        wide = tiny(len(words), hidden_size=32)
        get_peft_model(wide, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")).save_pretrained("wide")
        for name in ("nameless", "pickled_adapter"):
            shutil.copytree("wide", name)
        Path("nameless/adapter_config.json").unlink()
        Path("pickled_adapter/adapter_model.safetensors").rename("pickled_adapter/adapter_model.bin")
        bytes_alone().save_pretrained("spelled")
        split_words_tokenizer().save_pretrained("plain")
    return root


Refused = Callable[..., str]


@pytest.fixture
def refused(
    given: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Refused:
    """refused("source", changes) runs a cell with the smoke preset and changes; returns what it says."""

    def run(cell: str, changes: list[str]) -> str:
        compose(REPOSITORY / "params.yaml", tmp_path / "p.yaml", REPOSITORY / "stages/presets/smoke.yaml", SIZES)
        compose(tmp_path / "p.yaml", given / "params.yaml", None, changes)
        monkeypatch.chdir(given)
        monkeypatch.setattr(stage, "_cache", {})
        monkeypatch.setattr(sys, "argv", cell.split())
        before = written()
        with pytest.raises(SystemExit) as caught:
            runpy.run_module(f"stages.{cell.split()[0]}", run_name="__main__")
        assert caught.value.code == 2 and written() == before, "nothing is written"
        said = capsys.readouterr().err.splitlines()
        assert said[-1].startswith("error: ") and not [line for line in said if "Traceback" in line]
        print(said[-1])
        return said[-1]

    return run


def written() -> list[Path]:
    return sorted(path for folder in ("models", "data", "reports") for path in Path(folder).rglob("*"))


OF_BASES = [
    (base("gone"), "source.model = 'gone': model 'gone' is missing: must be a folder, or a model on the hub"),
    (base("owner/name"), "source.model = 'owner/name': .* HF_HUB_OFFLINE is set and it was not downloaded before"),
    (base("pickled"), "source.model = 'pickled': .* holds no .safetensors file; only safetensors weights are loaded"),
    (base("disguised"), "source.model = 'disguised': .* must be whole safetensors files, not pickles of that name"),
    (base("broken"), "source.model = 'broken': model.layers.1.mlp.up_proj.weight holds numbers that are not finite"),
    (base("mamba"), "source.model = 'mamba': model type 'mamba' is not supported: must be one of llama, "),
    (
        base("fewer_rows"),
        r"source.model = 'fewer_rows': its tokenizer has tokens up to \d+, its embeddings have \d+ rows",
    ),
    (
        base(adapter="gone"),
        "source.model = 'theirs': adapter 'gone' is missing: must be a folder, or an adapter on the hub",
    ),
    (base(adapter="nameless"), "adapter 'nameless' holds no adapter_config.json; only adapters with safetensors"),
    (base(adapter="pickled_adapter"), "'pickled_adapter' holds no adapter_model.safetensors; only adapters with safet"),
    (base(adapter="wide"), "source.model = 'theirs': adapter 'wide' does not fit its base"),
]
OF_ARMS = [
    (arm("gone"), "finetune.theirs.import = 'gone': model 'gone' is missing: must be a folder, or a model on the hub"),
    (arm("owner/name"), "finetune.theirs.import = 'owner/name': .* HF_HUB_OFFLINE is set and it was not downloaded"),
    (arm("pickled"), "finetune.theirs.import = 'pickled': .* holds no .safetensors file"),
    (arm("disguised"), "finetune.theirs.import = 'disguised': .* must be whole safetensors files, not pickles"),
    (arm("broken"), "finetune.theirs.import = 'broken': model.layers.1.mlp.up_proj.weight holds numbers that are not"),
    (arm("mamba"), "finetune.theirs.import = 'mamba': .* in its config, that of the base has .*: must be a fine-tuned"),
    (
        arm("deeper"),
        "finetune.theirs.import = 'deeper': .* in its config, that of the base has .*: must be a fine-tuned",
    ),
    (arm("regrouped"), "finetune.theirs.import = 'regrouped': head_dim = 8 in its config, that of the base has 4"),
    (
        arm("swapped"),
        r"finetune.theirs.import = 'swapped': in its tokenizer '.*' is \d+, in that of the base \d+ \(2 such",
    ),
    (arm("more_words"), r"finetune.theirs.import = 'more_words': .*must have the tokens of the base, and others only"),
    (arm("fewer_rows"), r"finetune.theirs.import = 'fewer_rows': vocab_size = \d+ in its config, that of the base has"),
    (
        arm("theirs", "wide"),
        r"finetune.theirs.adapter = 'wide': .* a matrix of \(2, 32\), .* must be an adapter of this",
    ),
    (arm("theirs", "nameless"), "finetune.theirs.import = 'theirs': adapter 'nameless' holds no adapter_config.json"),
]


@pytest.mark.parametrize(("changes", "sentence"), [*OF_BASES, *OF_ARMS], ids=lambda value: str(value)[:50])
def test_a_model_that_does_not_fit_is_refused_by_stage_source(
    refused: Refused, changes: list[str], sentence: str
) -> None:
    found = refused("source", changes)
    assert re.search(sentence, found), found


TEACH = (
    "teach={level: 0.9, most_steps: 2, prompts_per_step: 4, learning_rate: 0.0001, warmup_steps: 1, spread: 0.0, "
    "check_every: 1, check_prompts: 8, weight_decay: 0.0, clip: 1.0}"
)


def test_a_task_whose_words_are_no_single_tokens_is_refused(refused: Refused, given: Path) -> None:
    for tokenizer, changes, sentence in (
        ("plain", ["new_task=arithmetic"], "new_task = 'arithmetic': "),
        ("plain", ["new_task=ioi"], "new_task = 'ioi': "),
        (
            "plain",
            ["dcm.of_base=[positional-other_order]"],
            "dcm: 'positional-other_order' cannot be asked with this tok",
        ),
        (
            "spelled",
            [],
            "old_task = 'boxes': boxes = 3: 0 objects and 0 labels are left: must be fewer boxes, or a token",
        ),
        ("spelled", ["old_task=ioi", "dcm.desiderata=[name_value]", "dcm.of_base=[]"], "old_task = 'ioi': "),
    ):
        shutil.rmtree(given / "models", ignore_errors=True)
        shutil.copytree(given / tokenizer, given / "models/source")
        assert sentence in refused("synthesize", [*base(), *changes])
    shutil.rmtree(given / "models")


def cells(monkeypatch: pytest.MonkeyPatch, changes: list[str], *modules: Any) -> None:
    """Run stages with the smoke preset and changes."""
    compose(REPOSITORY / "params.yaml", Path("params.yaml"), REPOSITORY / "stages/presets/smoke.yaml", SIZES)
    compose(Path("params.yaml"), Path("params.yaml"), None, changes)
    monkeypatch.setattr(stage, "_cache", {"params": load_params("params.yaml")})
    for module in modules:
        module.main(Cell(module.__name__.rpartition(".")[2], {}))


def test_a_base_that_does_not_do_the_old_task_is_refused(refused: Refused, given: Path, monkeypatch: Any) -> None:
    """Untaught, or taught without success; nothing of it is kept."""
    monkeypatch.chdir(given)
    cells(monkeypatch, base(), source, synthesize)
    assert (
        "of the selection prompts of old_task = 'boxes', below discover.identifiable_accuracy = 0.5: must be"
        in refused("pretrain 0", base())
    )
    assert "teach.most_steps = 2: the model answers" in refused("pretrain 0", [*base(), TEACH])
    # an arm that was named after stage `source` ran, before anything is taught
    named = [*arm("deeper"), TEACH]
    assert "finetune.theirs.import = 'deeper': " in refused("pretrain 0", named)
    for folder in ("models", "data", "reports"):
        shutil.rmtree(folder, ignore_errors=True)


def test_tokens_that_were_only_added_are_left_out(given: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model with a pad token behind the base's tokens is the base's arm, with the base's rows."""
    monkeypatch.chdir(given)
    cells(monkeypatch, arm("padded"), source, synthesize)
    save_model(load_model("theirs"), load_tokenizer("theirs"), "models/base/0")
    section = Imported.model_validate({"import": "padded", "adapter": None, "revision": None})
    old, new = Path("data/old/selection.parquet"), Path("data/new/adjacent/selection.parquet")
    Path("runs").mkdir()
    bring("theirs", section, Path("models/base/0"), old, new, 4, Path("runs"))
    [checkpoint] = Path("runs").rglob("*.safetensors")
    found = load_file(checkpoint)
    padded: Any = load_model("padded")
    ours = load_model("theirs").state_dict()
    assert len(padded.get_input_embeddings().weight) == len(ours["model.embed_tokens.weight"]) + 1
    for name, weight in padded.named_parameters():
        assert torch.equal(found[name], weight[: len(ours[name])]), name
    for folder in ("models", "data", "runs"):
        shutil.rmtree(folder)


# --- the hub


class _Hub(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does of a gated model, of a revision that is not there, and of what it has not."""

    def do_HEAD(self) -> None:
        gated, revision = self.path.startswith("/owner/gated"), self.path.startswith("/owner/known")
        self.send_response(403 if gated else 404)
        self.send_header("X-Error-Code", "GatedRepo" if gated else "RevisionNotFound" if revision else "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_what_the_hub_does_not_give_is_one_sentence(endpoint: str, tmp_path: Path) -> None:
    """Through the hub's own library, all at once, as it tries five times to reach a hub that does not answer."""
    running = []
    for number, (model, revision, at, sentence) in enumerate(
        [
            ("owner/gated", "null", endpoint, "it is gated: ask for access on its page there"),
            ("owner/missing", "null", endpoint, "there is none of this name, or it is private"),
            ("owner/known", "v9", endpoint, "at revision v9 .* it has no such revision: must be a branch"),
            ("owner/name", "null", "http://127.0.0.1:9", "the hub cannot be reached: needs a network"),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        shutil.copy(REPOSITORY / "dvc.yaml", folder)
        change = f"source={{kind: hub, model: {model}, revision: {revision}, adapter: null, bos: null}}"
        compose(REPOSITORY / "params.yaml", folder / "params.yaml", None, [change])
        environment = {name: value for name, value in os.environ.items() if name != hub.OFFLINE}
        environment |= {"HF_ENDPOINT": at, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-m", "stages", "source"]
        process = subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)
        running.append((process, folder, model, sentence))
    for process, folder, model, sentence in running:
        said = process.communicate()[1].splitlines()[-1]
        print(said)
        assert process.returncode == 2 and re.match(f"error: source.model = '{model}': .*{sentence}", said), said
        assert not (folder / "models").exists()


@pytest.mark.parametrize(("said", "asked"), [(None, True), ("0", True), ("1", False), ("yes", False)])
def test_who_says_offline_is_believed(said: str | None, asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_of_ours", set())
    monkeypatch.delenv(hub.OFFLINE)
    if said is not None:
        monkeypatch.setenv(hub.OFFLINE, said)
    before = constants.HF_HUB_OFFLINE
    hub.stay_offline()
    with hub.online():
        assert (not constants.HF_HUB_OFFLINE) == asked
    assert constants.HF_HUB_OFFLINE == before and os.environ[hub.OFFLINE] == (said or "1")
