"""The registered experiments: they are what the presets run, no pilot counts, and no report claims more than it may."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from stages.pipeline.overrides import PRESETS, compose
from stages.pipeline.params import load_params
from stages.statistics.registration import PILOTS, read_params, standing
from tests.conftest import REPOSITORY

FOLDER = REPOSITORY / "reports/registered"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
REPORTS = sorted(path.parent for path in (REPOSITORY / "reports").glob("*/statistics.json"))


def refuse(report: Path, folder: Path = FOLDER) -> None:
    """A report that calls itself registered must have the registered params, of the file that is there now."""
    claimed = json.loads((report / "statistics.json").read_text()).get("registration")
    if claimed is None or claimed["kind"] == "exploratory":
        return
    found = standing(read_params(report / "params.yaml"), folder)
    assert found == claimed, f"{report.name}: {found['kind']}, {found['differ']}"
    assert not found["pilots"]


@pytest.mark.parametrize("name", NAMES)
def test_a_registered_experiment_is_what_its_preset_runs(name: str, tmp_path: Path) -> None:
    load_params(FOLDER / f"{name}.yaml")
    compose(REPOSITORY / "params.yaml", tmp_path / "params.yaml", REPOSITORY / PRESETS / f"{name}.yaml", [])
    found = standing(read_params(tmp_path / "params.yaml"), FOLDER)
    assert (found["kind"], found["name"], found["pilots"]) == ("confirmatory", name, []), found["differ"]


@pytest.mark.parametrize("name", NAMES)
def test_no_pilot_is_counted_and_the_text_names_what_is_registered(name: str) -> None:
    params = read_params(FOLDER / f"{name}.yaml")
    assert not set(params["seeds"]) & set(PILOTS)
    text = (REPOSITORY / "reports/registration.md").read_text()
    assert f"registered/{name}.yaml" in text
    hypotheses = re.findall(r"^- \*\*H\d\*\*: `(\w+)`[^`]*?minus\s+`(\w+)`", text, re.MULTILINE | re.DOTALL)
    assert [list(pair) for pair in hypotheses] == params["contrast"]["contrasts"]
    said = {
        f"Rate {params['match']['learning_rate']:.0e}".replace("e-0", "e-"),
        f"with {params['finetune']['common']['warmup_steps']} steps",
        f"of {params['finetune']['common']['steps']} steps",
        f"at least {params['match']['level']:g}".replace("0.", "."),
        f"at least {1 - params['evaluate']['idle_tolerance']:g}".replace("0.", "."),
        f"at least {params['contrast']['base_faithfulness']:g}".replace("0.", "."),
        f"n = {len(params['seeds'])}",
        f"±{params['contrast']['equivalence_margin']:g}".replace("0.", "."),
    }
    assert {words for words in said if words not in text} == set()


@pytest.mark.parametrize("report", REPORTS, ids=lambda report: report.name)
def test_a_report_says_no_more_than_was_registered(report: Path) -> None:
    refuse(report)


@pytest.mark.parametrize("changed", ["params", "registered", "pilot"])
def test_a_report_with_other_params_is_refused(tmp_path: Path, changed: str) -> None:
    folder, report = tmp_path / "registered", tmp_path / "claim"
    folder.mkdir()
    report.mkdir()
    text = "seeds: [8, 9]\nmatch: {level: 0.9}\n"
    (folder / "claim.yaml").write_text(text)
    (report / "params.yaml").write_text(text)
    found = standing(read_params(report / "params.yaml"), folder)
    assert found["digest"] == hashlib.sha256(text.encode()).hexdigest()
    (report / "statistics.json").write_text(json.dumps({"registration": found}))
    refuse(report, folder)
    if changed == "params":
        (report / "params.yaml").write_text(text.replace("0.9", "0.8"))
    elif changed == "registered":  # after the fact
        (folder / "claim.yaml").write_text(f"{text}# another word\n")
    else:
        (report / "params.yaml").write_text(text.replace("[8", "[0, 8"))
    with pytest.raises(AssertionError):
        refuse(report, folder)
