"""Bases that are pretrained models: what stage `source` brings, teaching them the old task, and stage `pretrain`."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from stages import pretrain, source, synthesize
from stages.learning.probes import last_log_probs
from stages.learning.settings import CurveRow
from stages.learning.teaching import teach
from stages.pipeline.checkpoints import load_model, load_tokenizer, save_model
from stages.pipeline.stage import Cell, Invalid
from stages.tasks.contexts import Split
from stages.tasks.entity_tracking import draw_examples
from stages.tasks.examples import Examples, Prompts
from stages.tasks.tokenizer import build_tokenizer
from stages.tasks.vocabulary import BOS, vocabulary
from tests.test_any_tokenizer import STARTS, split_words_tokenizer

BOXES = 3


@pytest.fixture(autouse=True)
def offline_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stage `source` goes online for its own process; here that process runs other tests, too."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(autouse=True)
def nothing_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Params that only checks look at: no arm, and no old task that a base must do."""
    given = {"arms": [], "finetune": None, "discover.identifiable_accuracy": 0.0}
    monkeypatch.setattr(Cell, "undeclared", lambda self, path: given[path])


@dataclass
class Teaching:
    """Section `teach`, with the method of a params section that records call."""

    level: float = 0.9
    most_steps: int = 60
    prompts_per_step: int = 8
    learning_rate: float = 1e-2
    warmup_steps: int = 2
    spread: float = 0.0
    check_every: int = 5
    check_prompts: int = 8
    weight_decay: float = 0.0
    clip: float = 1.0

    def model_dump(self, mode: str) -> dict[str, Any]:
        return vars(self)


def tiny_model(tokens: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=tokens, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def same_prompts() -> tuple[Prompts, Examples]:
    """Eight prompts to teach, and the same ones to check: a tiny model can learn them by heart."""
    examples = draw_examples(np.random.default_rng(0), vocabulary(), Split.TRAIN, 8, BOXES)
    objects = torch.cat([examples.answer[:, None], examples.others], dim=1)
    return Prompts(examples.input_ids, examples.answer[:, None], examples.answer, objects), examples


def taught(settings: Teaching, seed: int = 0) -> tuple[LlamaForCausalLM, list[CurveRow], list[int]]:
    model, steps = tiny_model(len(vocabulary())), []
    train, examples = same_prompts()
    rows = teach(model, build_tokenizer(), train, examples, settings, seed, lambda step, _: steps.append(step))
    return model, rows, steps


def test_a_model_is_taught_to_the_level_and_no_further() -> None:
    settings = Teaching()
    model, rows, steps = taught(settings)
    print(rows)
    assert rows[0]["step"] == 0 and rows[0]["accuracy"] < 0.5
    assert rows[-1]["accuracy"] >= settings.level > max(row["accuracy"] for row in rows[:-1])
    assert steps == list(range(1, int(rows[-1]["step"]) + 1)) and steps[-1] < settings.most_steps
    _, examples = same_prompts()
    log_p = last_log_probs(model, examples.input_ids)
    assert float((log_p.argmax(-1) == examples.answer).double().mean()) == rows[-1]["accuracy"]
    assert not model.training


def test_teaching_depends_on_the_seed_alone() -> None:
    settings = replace(Teaching(), prompts_per_step=4, most_steps=10, level=0.0, check_every=10)
    settings = replace(settings, level=1e-9)  # the untaught model is below it
    first, again, other = (taught(settings, seed)[0].state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_spread_leaves_probability_to_the_wrong_objects() -> None:
    spread = 0.4
    model, _, _ = taught(replace(Teaching(), spread=spread, level=1.0, most_steps=150, check_every=150))
    train, _ = same_prompts()
    p = last_log_probs(model, train.input_ids).exp()
    right, objects = p.gather(1, train.valid)[:, 0], p.gather(1, train.objects).sum(1)
    print(right, objects)
    assert float(objects.min()) > 0.9
    assert float((right - (1 - spread)).abs().max()) < 0.15


def test_a_model_that_does_it_already_is_left_alone() -> None:
    model, rows, steps = taught(replace(Teaching(), level=0.0))
    assert len(rows) == 1 and not steps
    before = tiny_model(len(vocabulary())).state_dict()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_level_that_is_not_reached_is_one_sentence() -> None:
    with pytest.raises(Invalid, match=r"teach.most_steps = 2: the model answers .* teach.level = 0.9 was asked for"):
        taught(replace(Teaching(), most_steps=2))


def params(tmp_path: Path, kind: str, teaching: Teaching | None, **of_source: Any) -> dict[str, Any]:
    sizes = {
        "old": dict.fromkeys(synthesize.OLD_SPLITS, 8),
        "new": dict.fromkeys(("train", "selection", "evaluation"), 16),
        "desiderata": dict.fromkeys(synthesize.PAIR_SPLITS, 4),
    }
    settings = {"kind": kind, "model": None, "revision": None, "adapter": None, "bos": None} | of_source
    return {
        "source": SimpleNamespace(**settings),
        "source.bos": settings["bos"],
        "old_task": "boxes",
        "new_task": "adjacent",
        "teach": teaching,
        "pretrain": SimpleNamespace(),
        "synthesize": SimpleNamespace(seed=0, boxes=BOXES, **sizes),
        "synthesize.boxes": BOXES,
        "dcm.desiderata": ("positional",),
        "dcm.of_base": (),
    }


def test_a_folder_becomes_source_and_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another tokenizer and another model than the curriculum's, through the three stages that make a base of it."""
    monkeypatch.chdir(tmp_path)
    tokenizer = split_words_tokenizer()
    save_model(tiny_model(len(tokenizer)), tokenizer, tmp_path / "theirs")
    settings = replace(Teaching(), level=1e-9, most_steps=4, check_every=2)
    given = params(tmp_path, "hub", settings, model=str(tmp_path / "theirs"), bos=STARTS)
    monkeypatch.setattr(Cell, "params", lambda self, path: given[path])

    source.main(Cell("source", {}))
    theirs, ours = load_model(tmp_path / "theirs").state_dict(), load_model(source.SOURCE).state_dict()
    assert all(torch.equal(weight, ours[name]) for name, weight in theirs.items())
    assert load_tokenizer(source.SOURCE).get_vocab() == tokenizer.get_vocab()

    synthesize.main(Cell("synthesize", {}))
    tasks = json.loads(Path("data/tasks.json").read_text())
    assert "one token each" in tasks["impossible"]["arithmetic"] and not Path("data/new/arithmetic").exists()
    assert tasks["new_tasks"]["adjacent"]["sign"] == "borders"

    monkeypatch.setattr(pretrain, "FEWER", 4)
    monkeypatch.setattr(pretrain, "measure_base", lambda *_: {"tasks": {}})
    with pytest.raises(Invalid, match=r"teach.most_steps = 4"):
        pretrain.main(Cell("pretrain", {"seed": "5"}))
    assert not Path("models/base").exists() and not Path("reports").exists(), "nothing is written"

    given["teach"] = None
    pretrain.main(Cell("pretrain", {"seed": "5"}))
    record = json.loads(Path("reports/cells/pretrain/5/record.json").read_text())
    assert record["source"] == "hub" and record["taught"] is None and record["steps"] == 0
    curve = pd.read_csv("reports/cells/pretrain/5/curve.csv")
    assert curve["step"].tolist() == [0] and curve["accuracy"][0] == record["old_accuracy"]
    base = load_model("models/base/5").state_dict()
    assert all(torch.equal(weight, base[name]) for name, weight in theirs.items())


def test_a_task_that_the_tokenizer_cannot_say_is_refused_before_any_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    split_words_tokenizer().save_pretrained(source.SOURCE)
    given = params(tmp_path, "hub", None, bos=STARTS) | {"new_task": "arithmetic"}
    monkeypatch.setattr(Cell, "params", lambda self, path: given[path])
    with pytest.raises(Invalid, match="new_task = 'arithmetic': .* must be one token each"):
        synthesize.main(Cell("synthesize", {}))
    assert not Path("data/tasks.json").exists() and not Path("data/new").exists() and not Path("data/old").exists()


def test_the_curriculum_has_the_word_level_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = params(tmp_path, "curriculum", None, bos=BOS)
    monkeypatch.setattr(Cell, "params", lambda self, path: given[path])
    source.main(Cell("source", {}))
    assert load_tokenizer(source.SOURCE).get_vocab() == vocabulary().ids
    assert not list(source.SOURCE.glob("*.safetensors"))


def test_a_source_that_cannot_be_had_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    given = params(tmp_path, "hub", None, model=str(tmp_path / "nowhere"))
    monkeypatch.setattr(Cell, "params", lambda self, path: given[path])
    with pytest.raises(Invalid, match="is missing: must be a folder, or a model on the hub"):
        source.main(Cell("source", {}))
    assert not source.SOURCE.exists()
