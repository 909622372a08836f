"""README's recipes for one's own models, arms and tasks, as they stand there, on a copy of the project: tiny random
models in folders, with a byte-level BPE tokenizer, go through the stages."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from stages.learning.probes import last_log_probs
from stages.pipeline.checkpoints import load_model, save_model
from stages.pipeline.overrides import compose, preset_names
from stages.pipeline.params import load_params
from stages.pipeline.warm_start import ADDRESS
from stages.tasks.examples import read_examples, read_prompts
from stages.tasks.ioi import NAMES, PLACES, THINGS
from tests.conftest import REPOSITORY
from tests.readme import commands, write_block
from tests.test_any_tokenizer import split_words_tokenizer

SIZES = [
    "synthesize.boxes=3",
    "synthesize.old={selection: 8, discovery: 12, pruning: 6, evaluation: 8, relearning: 4, means: 8}",
    "synthesize.new={train: 64, selection: 8, evaluation: 8}",
    "synthesize.desiderata={train: 8, selection: 6, test: 6}",
    "discover.examples=12",
    "dcm.of_base=[]",
    "drift.relearning={examples: 4, probe_examples: 8, share: 0.9, most_steps: 2, learning_rate: 0.001, "
    "betas: [0.9, 0.999], weight_decay: 0.0}",
    "match.level=0.95",
    "match.levels=[0.95]",
    "finetune.common.probe_examples=8",
]
TAUGHT = [
    "teach.level=0.1",
    "teach.learning_rate=0.01",
    "teach.most_steps=200",
    "teach.prompts_per_step=8",
]  # a random model guesses .01
Stages = Callable[..., None]


def tokenizer() -> PreTrainedTokenizerFast:
    return split_words_tokenizer((*NAMES, *PLACES, *THINGS, "follows"))


def cell(stage: str, **axes: str) -> str:
    """A cell of a stage as dvc.yaml runs it, at the learning rate of the smoke preset's matching unless told."""
    command = yaml.safe_load((REPOSITORY / "dvc.yaml").read_text())["stages"][stage]["cmd"]
    values = {"seed": "0", "learning_rate": "0.0003"} | axes
    return re.sub(r"\$\{item\.(\w+)\}", lambda axis: values[axis[1]], command.removeprefix("python -m stages "))


def adapter(seed: int) -> Any:
    """On a fresh copy of the model; it changes what it is on."""
    torch.manual_seed(seed)
    settings = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    return get_peft_model(load_model("mine/model"), settings)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the project, which has README's files and models of one's own."""
    root = tmp_path_factory.mktemp("own") / "project"
    shutil.copytree(REPOSITORY / "stages", root / "stages", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("params.yaml", "dvc.yaml", "requirements.txt", "requirements-compute.txt"):
        shutil.copy(REPOSITORY / name, root)
    for name in ("own_arm", "own_new_task", "own_old_task"):
        write_block(name, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        words = tokenizer()
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=0, eos_token_id=0, pad_token_id=0, initializer_range=0.1,
        )  # fmt: skip
        save_model(LlamaForCausalLM(config), words, "mine/model")
        adapter(1).save_pretrained("mine/adapter")
        adapter(2).save_pretrained("mine/lora")
        tuned = load_model("mine/model")
        with torch.no_grad():
            for weight in tuned.parameters():
                weight.add_(0.01 * torch.randn(weight.shape))
        save_model(tuned, words, "mine/tuned")
        yield root


@pytest.fixture(scope="module")
def stages(project: Path) -> Iterator[Stages]:
    """stages("match grpo 0", ...) runs cells in the project, each in a process of its own, as under `make repro`."""
    command = [sys.executable, "-m", "stages.pipeline.warm_start", "sh", "-c", f"echo ${ADDRESS}; cat"]
    server = subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdin is not None and server.stdout is not None
    environment = os.environ | {ADDRESS: server.stdout.readline().strip()}

    def run(*cells: str) -> None:
        for cell in cells:
            done = subprocess.run(
                [sys.executable, "-m", "stages", *cell.split()],
                cwd=project, env=environment, capture_output=True, text=True,
            )  # fmt: skip
            assert done.returncode == 0, f"{cell}: {done.stderr[-3000:]}"

    yield run
    server.stdin.close()
    server.wait()


def ask(project: Path, blocks: list[str], changes: list[str]) -> None:
    """The params of the project: those of the smoke preset, made smaller, with README's presets applied to them."""
    params = project / "params.yaml"
    compose(REPOSITORY / "params.yaml", params, REPOSITORY / "stages/presets/smoke.yaml", SIZES)
    for name in blocks:
        compose(params, params, write_block(name, project), changes if name == blocks[-1] else [])


@pytest.fixture(scope="module")
def bases(project: Path, stages: Stages) -> Path:
    """The project with a base made of one's own model, and sets of one's own new task."""
    ask(project, ["own_imports", "own_model"], [*TAUGHT, "new_task=follows"])
    stages("source", "synthesize", "pretrain 0")
    return project


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_model(folder).state_dict()


def test_ones_own_model_with_its_adapter_is_the_base(bases: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(bases)
    merged, source = adapter(1).merge_and_unload().state_dict(), weights(bases / "models/source")
    error = max(float((merged[name] - weight).abs().max()) for name, weight in source.items())
    print(f"largest difference from PEFT's own merging: {error:.1e}")
    assert error < 1e-6
    record = json.loads((bases / "reports/cells/pretrain/0/record.json").read_text())
    assert record["source"] == "hub" and record["steps"] > 0 and record["taught"]["level"] == 0.1
    curve = pd.read_csv(bases / "reports/cells/pretrain/0/curve.csv")
    assert curve["accuracy"].iloc[-1] >= 0.1 > curve["accuracy"].iloc[0]
    base = weights(bases / "models/base/0")
    assert any(not torch.equal(base[name], source[name]) for name in base)


def test_ones_own_new_task_is_found_by_its_being_there(bases: Path) -> None:
    words: Any = tokenizer()
    prompts = read_prompts(bases / "data/new/follows/selection.parquet")
    for ids, answer in zip(prompts.input_ids, prompts.canonical, strict=True):
        context, _, query = words.decode(ids).rpartition(". ")
        clauses = [clause.split(" is in Box ") for clause in context.split(", ")]
        label = query.removeprefix("Box ").removesuffix(" follows the")
        place = [where for _, where in clauses].index(label)
        assert place > 0 and clauses[place - 1][0].split()[1] == words.decode([int(answer)]).strip()
    facts = json.loads((bases / "data/tasks.json").read_text())["new_tasks"]["follows"]
    assert facts["sign"] == "follows" and facts["valid_answers"] == 1 and facts["best_shortcut"] < 1


def test_models_that_were_tuned_elsewhere_are_arms(
    bases: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(bases)
    rates = yaml.safe_load(Path("params.yaml").read_text())["learning_rates"]
    for arm in ("theirs", "ours"):
        stages(*(cell("finetune", arm=arm, learning_rate=str(rate)) for rate in rates), cell("match", arm=arm))
    expected = {"theirs": weights(bases / "mine/tuned"), "ours": adapter(2).merge_and_unload().state_dict()}
    for arm, model in expected.items():
        found = weights(bases / "models" / arm / "0")
        assert max(float((found[name] - weight).abs().max()) for name, weight in model.items()) < 1e-6
        record = json.loads((bases / f"reports/cells/match/{arm}/0.json").read_text())
        assert record["rule"].startswith("imported")


def test_ones_own_arm_trains_adapters(bases: Path, stages: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its checkpoints are what PEFT loads."""
    monkeypatch.chdir(bases)
    ask(bases, ["own_model", "own_arm_params", "own_lora"], [*TAUGHT, "finetune.common.steps=40", "match.steps=[40]"])
    stages("code", cell("finetune", arm="sft_two"))
    digests = json.loads((bases / "data/code/finetune/sft_two.json").read_text())
    assert "stages/learning/arms/sft_two.py" in digests
    run = max((bases / "models/runs/sft_two/0").iterdir())
    last = max(run.glob("0*.safetensors"))
    shutil.copy(last, run / "adapter_model.safetensors")
    prompts = read_prompts("data/new/adjacent/train.parquet")
    adapted: Any = PeftModel.from_pretrained(load_model("models/base/0"), str(run))
    assert {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name} == {"q_proj", "v_proj"}
    answers = torch.stack([prompts.canonical, prompts.valid[:, -1]], 1)
    before, after = (
        last_log_probs(model, prompts.input_ids).exp().gather(1, answers).mean(0)
        for model in (load_model("models/base/0"), adapted)
    )
    print(f"p of the canonical and the last answer: {before.tolist()} before, {after.tolist()} after")
    assert bool((after > before).all())
    run.joinpath("adapter_model.safetensors").unlink()


def test_ones_own_old_task_is_found_by_its_being_there(project: Path, stages: Stages, bases: Path) -> None:
    changes = ["old_task=ioi_gave", "new_task=ioi_gave", "dcm.desiderata=[name_value,s_position,s_identity]"]
    ask(project, ["own_model"], [*changes, "dcm.of_base=[]"])
    stages("synthesize")
    facts = json.loads((project / "data/old_task.json").read_text())
    assert facts["name"] == "ioi_gave" and (project / "data/new/ioi_gave/train.parquet").is_file()
    texts = tokenizer().batch_decode(read_examples(project / "data/old/discovery.parquet").input_ids)
    assert len(texts) == 12 and all(text.startswith("When ") and " gave a " in text for text in texts)


# --- commands


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith("make ")])
def test_every_verb_is_there(command: str) -> None:
    """A dry run: what it would do ends in one of the commands of the pipeline."""
    done = subprocess.run(
        ["make", "--dry-run", *shlex.split(command)[1:]], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0 and "python -m " in done.stdout, done.stderr


def asked(command: str) -> tuple[str | None, list[str]]:
    """Preset and changes of a command."""
    words = shlex.split(command.replace("$(", "").replace(")", ""))
    if words[0] == "make":
        words = ["stages.pipeline.preset", words[1], *shlex.split(words[2].removeprefix("ARGS="))]
    changes = [words[at + 1] for at, word in enumerate(words) if word == "-S"]
    module = next((at for at, word in enumerate(words) if word.startswith("stages.pipeline.")), None)
    return None if module is None else words[module + 1], changes


WITH_PARAMS = [line for line in commands() if " -S " in line or "pipeline.preset" in line or "overrides" in line]


@pytest.mark.parametrize("command", WITH_PARAMS)
def test_presets_and_changes_make_valid_params(command: str, tmp_path: Path) -> None:
    preset, changes = asked(command)
    assert preset is None or preset in preset_names()
    file = None if preset is None else REPOSITORY / f"stages/presets/{preset}.yaml"
    compose(REPOSITORY / "params.yaml", tmp_path / "params.yaml", file, changes)
    load_params(tmp_path / "params.yaml")
