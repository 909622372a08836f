"""The specification curve and the standing of an experiment among the registered ones, by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from stages.statistics.cells import Cells, read_cells
from stages.statistics.contrasts import Plan
from stages.statistics.paired import t_interval
from stages.statistics.registration import sentence, standing
from stages.statistics.specification import Choice, specifications
from tests.synthetic_records import Experiment

PLAN = Plan(
    "evaluate.circuit.retention", (), 0.9, (("grpo", "sft_gold"),), (), (("noise", "sft_gold"),), 0.95, 0.05, 0.8, 0.05,
    9, 0,
)  # fmt: skip
EXPERIMENT = Experiment(
    seeds=range(5), arms=("sft_gold", "grpo", "noise"), unreached=frozenset({("grpo", 1)}), hidden=frozenset({3})
)


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    root = tmp_path_factory.mktemp("specification")
    EXPERIMENT.write(root)
    return read_cells(root / "reports/cells", EXPERIMENT.seeds, EXPERIMENT.arms)


def test_every_choice_by_hand(cells: Cells) -> None:
    (found,) = specifications(cells, PLAN)
    assert (found["name"], found["arm"], found["reference"]) == ("H1", "grpo", "sft_gold")
    by_choice = {
        Choice(*(entry[key] for key in ("rate", "matching", "measure", "ablation"))): entry
        for entry in found["choices"]
    }
    differences = [entry["difference"] for entry in found["choices"]]
    assert differences == sorted(differences) and len(by_choice) == len(differences)
    assert {choice.rate for choice in by_choice} == {"0.0001", "0.0003"}
    assert not any(choice.matching == "kl_2" for choice in by_choice)  # no run gets there

    def kept(arm: str, seed: str, kind: str) -> float:
        entry = cells.record("matchings", arm, seed)["matchings"]["norm_3"]["0.0001"]
        base = cells.record("evaluate", "base", seed)["circuit"]
        return entry["circuit_by_ablation"][kind]["accuracy"] / base["accuracy"]

    by_hand = [kept("grpo", seed, "own_means") - kept("sft_gold", seed, "own_means") for seed in "0124"]
    entry = by_choice[Choice("0.0001", "norm_3", "retention", "own_means")]
    assert entry["n"] == 4 and not entry["planned"]  # seed 3 has no circuit
    assert entry["difference"] == pytest.approx(np.mean(by_hand)) and entry["ci"] == pytest.approx(
        t_interval(by_hand, 0.95)
    )
    whole = by_choice[Choice("0.0003", "steps_160", "old_accuracy", None)]

    def old(arm: str, seed: str) -> float:
        return cells.record("matchings", arm, seed)["matchings"]["steps_160"]["0.0003"]["old_accuracy"]

    by_hand = [old("grpo", seed) - old("sft_gold", seed) for seed in "0124"]
    assert whole["difference"] == pytest.approx(np.mean(by_hand))

    (planned,) = (entry for entry in found["choices"] if entry["planned"])
    assert (planned["rate"], planned["matching"], planned["measure"], planned["ablation"]) == (
        "0.0003", "accuracy_0_9", "retention", "own_means"
    )  # fmt: skip
    assert planned["n"] == 3  # seed 1 did not get to the level
    counted = [entry for entry in found["choices"] if entry["n"] > 1]
    assert found["of"] == len(counted)
    assert found["agree"] == sum(entry["difference"] * planned["difference"] > 0 for entry in counted)
    assert found["clear"] + found["against"] == sum(entry["ci"][0] > 0 or entry["ci"][1] < 0 for entry in counted)


def test_the_planned_choice_follows_the_primary_measure(cells: Cells) -> None:
    def planned(primary: str) -> list[tuple[str, str | None]]:
        (found,) = specifications(cells, replace(PLAN, primary=primary))
        return [(entry["measure"], entry["ablation"]) for entry in found["choices"] if entry["planned"]]

    assert planned("evaluate.circuit.retention_ld") == [("retention_ld", "own_means")]
    assert planned("evaluate.old_accuracy") == [("old_accuracy", None)]
    assert planned("drift.old.kl") == []
    (found,) = specifications(cells, replace(PLAN, primary="drift.old.kl"))
    assert found["agree"] is None and found["of"] > 0


def write(folder: Path, name: str, params: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(params))


REGISTERED = {"seeds": [8, 9, 10], "arms": ["a", "b"], "match": {"level": 0.9}, "report": {"dpi": 110}}


@pytest.mark.parametrize(
    ("changes", "kind", "differ"),
    [
        ({}, "confirmatory", []),
        ({"report": {"dpi": 60}}, "confirmatory", []),
        ({"seeds": [8, 10]}, "part", ["seeds"]),
        ({"seeds": [8, 9, 10, 11]}, "exploratory", ["seeds"]),
        ({"match": {"level": 0.8}}, "exploratory", ["match.level"]),
        ({"seeds": [8], "arms": ["a"]}, "exploratory", ["arms", "seeds"]),
        ({"new": {"key": 1}}, "exploratory", ["new.key"]),
    ],
)
def test_only_the_registered_params_are_confirmatory(
    tmp_path: Path, changes: dict, kind: str, differ: list[str]
) -> None:
    write(tmp_path, "claim", REGISTERED)
    write(tmp_path, "other", REGISTERED | {"arms": ["c"], "seeds": [20], "match": {"level": 0.1}})
    found = standing(REGISTERED | changes, tmp_path)
    assert (found["kind"], found["name"], found["differ"], found["pilots"]) == (kind, "claim", differ, [])
    assert sentence(found).startswith({"confirmatory": "Confirmatory", "part": "A part"}.get(kind, "Exploratory"))
    assert kind == "exploratory" or found["digest"][:12] in sentence(found)


def test_pilots_are_named(tmp_path: Path) -> None:
    found = standing({"seeds": [0, 3, 9]}, tmp_path)
    assert found["kind"] == "exploratory" and found["name"] is None and found["pilots"] == [0, 3]
    assert sentence(found) == (
        "Exploratory: this experiment was not registered; seeds 0, 3 are pilots, on which rules and levels were chosen."
    )
