"""`new_task: sums` through the stages: answers of several tokens are learned, matched, evaluated and compared.

The base is a small model with random weights and a byte-pair tokenizer, which is taught the sums of its training split
until it samples one in eight, so that RL has something to reward. What is asked afterwards are these sums, as such a
model learns them by heart and no others.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import pre_tokenizers

from stages import discover, drift, evaluate, finetune, match, pretrain, source, synthesize
from stages.pipeline.checkpoints import load_model, save_model
from stages.pipeline.stage import Cell
from stages.tasks.examples import Prompts, read_prompts
from stages.tasks.vocabulary import LABELS, OBJECTS
from tests.conftest import REPOSITORY
from tests.small_llama import SIZES, prepare, small_llama
from tests.test_sums import END, bpe

ARMS = ("sft_gold", "dr_grpo")
SUMS = Path("data/new/sums")
STEPS, PROMPTS, SAMPLES = 24, 8, 8
CHANGES = [
    *SIZES,
    "new_task=sums",
    f"source.bos='{END}'",
    f"arms=[{','.join(ARMS)}]",
    "learning_rates=[3e-4]",
    f"finetune.common.steps={STEPS}",
    f"finetune.common.prompts_per_step={PROMPTS}",
    "finetune.common.dense_until=8",
    "finetune.common.dense_every=4",
    "finetune.common.sparse_checkpoints=2",
    "finetune.common.probe_examples=16",
    f"finetune.dr_grpo.samples_per_prompt={SAMPLES}",
    "match.learning_rate=3e-4",
    "match.level=0.8",
    "match.levels=[0.8]",
    "match.like=sft_gold",
    f"match.steps=[{STEPS}]",
    "contrast.contrasts=[[dr_grpo,sft_gold]]",
]


def said(row: torch.Tensor) -> list[int]:
    return [token for token in row.tolist() if token >= 0]


def log_probs(model: Any, prompts: Prompts) -> torch.Tensor:
    """Of the canonical answer of each prompt, by one pass over prompt and answer."""
    found = []
    for ids, answer in zip(prompts.input_ids, prompts.canonical, strict=True):
        tokens = said(answer)
        text = torch.cat([ids, torch.tensor(tokens)])[None]
        of_each = model(text).logits[0, len(ids) - 1 : -1].log_softmax(-1)
        found.append(of_each[range(len(tokens)), tokens].sum())
    return torch.stack(found)


def teach(model: Any, prompts: Prompts, share: float) -> None:
    """Until the answers have this probability on average."""
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        log_p = log_probs(model, prompts)
        if float(log_p.detach().exp().mean()) > share:
            return
        adam.zero_grad()
        (-log_p.mean()).backward()
        adam.step()
    raise AssertionError("not taught")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder in which the stages ran, up to `drift`."""
    folder = tmp_path_factory.mktemp("sums")
    words = [*["The", "the", "is", "in", "Box", "contains", "adjoins"] * 20, *OBJECTS[:40], *LABELS]
    digits = [pre_tokenizers.Digits(individual_digits=True)]
    tokenizer = bpe(digits, [f" {word}" for word in words] * 10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copy(REPOSITORY / "dvc.yaml", "dvc.yaml")
        prepare(patch, CHANGES)
        model = small_llama(len(tokenizer))
        save_model(model, tokenizer, "theirs")
        source.main(Cell("source", {}))
        synthesize.main(Cell("synthesize", {}))
        for split in ("selection", "evaluation"):
            shutil.copy(SUMS / "train.parquet", SUMS / f"{split}.parquet")
        teach(model, read_prompts(SUMS / "train.parquet"), 0.12)
        save_model(model, tokenizer, "theirs")
        source.main(Cell("source", {}))
        patch.setattr(pretrain, "FEWER", 4)
        pretrain.main(Cell("pretrain", {"seed": "0"}))
        for module in (finetune, match):
            for arm in ARMS:
                item = {"arm": arm, "seed": "0"} | ({"learning_rate": "0.0003"} if module is finetune else {})
                module.main(Cell(module.__name__.rpartition(".")[2], item))
        for module in (discover, evaluate):
            for name in ("base", *ARMS):
                module.main(Cell(module.__name__.rpartition(".")[2], {"model": name, "seed": "0"}))
        for arm in ARMS:
            drift.main(Cell("drift", {"arm": arm, "seed": "0"}))
    return folder


def record(stage: str, arm: str) -> Any:
    return json.loads(Path(f"reports/cells/{stage}/{arm}/0.json").read_text())


def test_arms_learn_whole_answers(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    prompts = read_prompts(SUMS / "train.parquet")
    assert prompts.several_tokens and prompts.one_answer and prompts.canonical.shape[1] == 4  # three digits and a stop
    for arm, answers in (("sft_gold", PROMPTS), ("dr_grpo", PROMPTS * SAMPLES)):
        curve = pd.read_csv(f"reports/cells/finetune/{arm}/0/0.0003.csv")
        assert curve["step"].tolist() == [0, 4, 8, 14, 24]
        assert curve["completions"].tolist() == [answers * step for step in curve["step"]]
        p = curve["new_valid_mass"].tolist()
        print(f"{arm}: p(answer) {[round(value, 3) for value in p]}")
        assert 0.12 < p[0] < 0.2 and p[-1] > 1.2 * p[0] and p == sorted(p)


@torch.no_grad()
def test_what_is_evaluated_is_what_the_models_say(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against answers that each model says token by token, prompt by prompt."""
    monkeypatch.chdir(run)
    prompts = read_prompts(SUMS / "evaluation.parquet")
    for name in ("base", *ARMS):
        model, right = load_model(f"models/{name}/0"), []
        for ids, answer in zip(prompts.input_ids, prompts.canonical, strict=True):
            text = ids.tolist()
            for _ in said(answer):
                text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
            right.append(text[len(ids) :] == said(answer))
        found = record("evaluate", name)
        print(f"{name}: {np.mean(right):.3f} are right")
        assert found["new_accuracy"] == pytest.approx(np.mean(right))
        assert found["new_valid_mass"] == pytest.approx(float(log_probs(model, prompts).exp().mean()), rel=1e-4)
        if name != "base":
            assert record("match", name)["new_accuracy_selection"] == pytest.approx(np.mean(right))


@torch.no_grad()
def test_drift_on_new_prompts_goes_along_the_answer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    prompts, base = read_prompts(SUMS / "evaluation.parquet").select(slice(0, 8)), load_model("models/base/0").double()
    for arm in ARMS:
        tuned, expected = load_model(f"models/{arm}/0").double(), []
        for ids, answer in zip(prompts.input_ids, prompts.canonical, strict=True):
            text = torch.cat([ids, torch.tensor(said(answer))])[None]
            p, q = (model(text).logits[0, len(ids) - 1 : -1].log_softmax(-1) for model in (base, tuned))
            expected.append(float((p.exp() * (p - q)).sum()))
        found = record("drift", arm)["new"]["kl"]
        print(f"{arm}: KL {found:.4f}, error {abs(found - np.mean(expected)):.1e}")
        assert found == pytest.approx(np.mean(expected), rel=1e-4) and found > 1e-3


def test_an_arm_that_is_taught_as_gold_says_so_and_is_the_same_model(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run)
    prepare(monkeypatch, CHANGES)
    finetune.main(Cell("finetune", {"arm": "self_sft", "seed": "0", "learning_rate": "0.0003"}))
    sentence = "self_sft: every prompt of 'sums' has one right answer, so it learns from the same answers as sft_gold\n"
    assert capsys.readouterr().err.count(sentence) == 1
    gold, own = (sorted(Path(f"models/runs/{arm}/0").rglob("*.safetensors")) for arm in ("sft_gold", "self_sft"))
    assert len(gold) == 4 and [path.read_bytes() for path in gold] == [path.read_bytes() for path in own]
