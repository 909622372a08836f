"""Presets as differences on params.yaml, and single params as DVC's own commands take them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.pipeline.overrides import PRESETS, compose, flattened
from stages.pipeline.params import load_params, parse_yaml
from stages.pipeline.preset import copy_with_preset
from stages.pipeline.stage import Invalid
from tests.conftest import REPOSITORY

PARAMS = REPOSITORY / "params.yaml"
NAMES = sorted(path.stem for path in (REPOSITORY / PRESETS).glob("*.yaml"))


def _composed(tmp_path: Path, preset: str | None, changes: list[str]) -> dict[str, Any]:
    file = tmp_path / "params.yaml"
    compose(PARAMS, file, None if preset is None else REPOSITORY / PRESETS / f"{preset}.yaml", changes)
    return parse_yaml(file.read_text())


@pytest.mark.parametrize("preset", NAMES)
def test_a_preset_makes_valid_params_and_says_only_what_differs(preset: str, tmp_path: Path) -> None:
    found = _composed(tmp_path, preset, [])
    load_params(tmp_path / "params.yaml")
    base = parse_yaml(PARAMS.read_text())
    assert list(found) == list(base)

    def compare(difference: dict[str, Any], base: dict[str, Any], found: dict[str, Any], path: str) -> None:
        for key, value in difference.items():
            if isinstance(value, dict) and isinstance(base.get(key), dict):
                compare(value, base[key], found[key], f"{path}{key}.")
            else:
                assert found[key] == value, f"{path}{key}"
                # an axis is the preset's own, whatever that of params.yaml is
                assert base.get(key) != value or path + key in ("seeds", "arms", "learning_rates"), (
                    f"{path}{key} is as in params.yaml"
                )

    compare(parse_yaml((REPOSITORY / PRESETS / f"{preset}.yaml").read_text()), base, found, "")


def test_a_new_param_breaks_no_preset(tmp_path: Path) -> None:
    more = tmp_path / "more.yaml"
    more.write_text(PARAMS.read_text() + "\nanother: {section: 1}\n")
    for preset in NAMES:
        compose(more, tmp_path / "params.yaml", REPOSITORY / PRESETS / f"{preset}.yaml", [])
        assert parse_yaml((tmp_path / "params.yaml").read_text())["another"] == {"section": 1}


def test_changes_win_over_the_preset_and_comments_stay(tmp_path: Path) -> None:
    found = _composed(tmp_path, "full", ["seeds=[7]", "match.level=0.9", "learning_rates=[1e-5,1e-3]"])
    assert found["seeds"] == [7] and found["match"]["level"] == 0.9 and len(found["arms"]) == 9
    assert found["learning_rates"] == [1e-5, 1e-3]
    assert "# one base each" in (tmp_path / "params.yaml").read_text()


def test_values_of_every_kind_come_back_from_the_syntax_of_overrides(tmp_path: Path) -> None:
    base = {"a": {"b": None, "list": [], "text": "x"}}
    difference = {
        "a": {
            "b": {"rate": 1e-05, "yes_": True, "no_": False, "none": None, "bos": "<bos>"},
            "list": ["null", "it's", "a, b", "positional-no_comma", 3, 0.5, [1, 2], "true", "", "10"],
            "text": "owner/name: {x} [y]",
        }
    }
    (tmp_path / "base.yaml").write_text(json.dumps(base))
    (tmp_path / "preset.yaml").write_text(json.dumps(difference))
    assert len(list(flattened(difference, base))) == 3, "where there is no mapping, one is one value"
    compose(tmp_path / "base.yaml", tmp_path / "out.yaml", tmp_path / "preset.yaml", [])
    assert parse_yaml((tmp_path / "out.yaml").read_text()) == difference


def test_a_preset_is_written_as_arguments_of_dvc(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "stages.pipeline.overrides", "enhancement"]
    said = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True).stdout.split()
    assert said[::2] == ["-S"] * (len(said) // 2)
    assert _composed(tmp_path, None, said[1::2]) == _composed(tmp_path, "enhancement", [])


BAD = [
    ("match.lvel=1", "'match.lvel': must be a param that params.yaml has"),
    ("unknown.section.x=1", "'unknown.section.x': must be a param"),
    ("seeds.x=1", "must be a param that params.yaml has"),
    ("match", "-S match: must be <param>=<value>"),
    ("seeds=[0", "-S seeds=[0: must be <param>=<value>"),
    ("seeds=1,2", "-S seeds=1,2: must be one value; a list stands in brackets"),
    ("other.yaml:a=1", "-S other.yaml:a=1: must be of params.yaml"),
]


@pytest.mark.parametrize(("change", "named"), BAD)
def test_a_bad_change_ends_in_one_sentence_and_writes_nothing(
    change: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(Invalid) as caught:
        copy_with_preset(tmp_path / "clone", PRESETS / "full.yaml", [change])
    message = str(caught.value)
    assert named in message and "\n" not in message
    assert not (tmp_path / "clone").exists()


@pytest.mark.parametrize("text", ["match: {lvel: 1}", "- match"])
def test_a_bad_preset_ends_in_one_sentence(text: str, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(Invalid, match="match.lvel|bad.yaml must hold a mapping"):
        compose(PARAMS, tmp_path / "params.yaml", tmp_path / "bad.yaml", [])


def test_the_preset_of_a_real_model_warms_up_on_adapters(tmp_path: Path) -> None:
    """Its checkpoints would not fit a disk otherwise, and a level that takes a few steps says little."""
    _composed(tmp_path, "smollm2", [])
    params = load_params(tmp_path / "params.yaml")
    common = params.finetune.common
    assert params.source.kind == "package" and params.teach is not None and params.synthesize.boxes == 7
    assert common.lora is not None and common.warmup_steps >= 20 and len(params.finetune.of("noise").scales) <= 2
    assert common.steps * common.prompts_per_step <= params.synthesize.new["train"], "no prompt is used twice"
