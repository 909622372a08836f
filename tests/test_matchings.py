"""Matchings: what is picked, the circuit in the picked checkpoints, their statistics, and the hypervolume."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit, Group
from stages.circuits.walker import Walker
from stages.evaluate import evaluate
from stages.learning.matching import Matching, matchings, pick
from stages.measures.checkpoints import record, scores
from stages.pipeline.resources import Resources
from stages.statistics.cells import Cells, read_cells
from stages.statistics.contrasts import Plan
from stages.statistics.frames import circuits_and_nulls
from stages.statistics.hypervolume import compare_hypervolumes, hypervolume, share_kept
from stages.statistics.matchings import compare_matchings, long_table, value
from stages.statistics.paired import t_interval
from stages.tasks.examples import Examples, Prompts
from tests.synthetic_records import FAR, Experiment
from tests.test_ablation import AT, IDS, MEMORY, random_model

PLAN = Plan(
    "evaluate.circuit.retention",
    (),
    0.9,
    (("grpo", "sft_gold"),),
    (),
    (("noise", "sft_gold"),),
    0.95,
    0.05,
    0.8,
    0.05,
    9,
    0,
)
EXPERIMENT = Experiment(
    seeds=range(4),
    arms=("sft_gold", "grpo", "noise"),
    unreached=frozenset({("grpo", 1)}),
    hidden=frozenset({3}),
)


def _rows(by: str, *values: float) -> list[dict[str, float]]:
    return [{"step": float(step), by: at} for step, at in enumerate(values)]


def test_names_are_keys_and_the_order_is_by_kind() -> None:
    found = matchings([0.95, 0.6], [2.0, 0.5], [3.0], [160])
    assert [m.name for m in found] == ["accuracy_0_6", "accuracy_0_95", "kl_0_5", "kl_2", "norm_3", "steps_160"]


def test_a_distance_needs_no_confirmation() -> None:
    kl = Matching("kl_new", 1.0)
    found = pick(_rows("kl_new", 5.0, 0.4, 1.2, 0.7, 1.4), kl, confirm=1)
    assert (found.reached, found.step, found.furthest) == (True, 2, 1.4)  # the base does not count
    missed = pick(_rows("weight_norm", 0.0, 0.4, 0.9), Matching("weight_norm", 1.0), confirm=1)
    assert (missed.reached, missed.step, missed.furthest) == (False, 2, 0.9)
    assert pick(_rows("weight_norm", 0.0, 0.4, 1.0), Matching("weight_norm", 1.0), confirm=1).step == 2


def test_a_checkpoint_is_measured_as_in_evaluate() -> None:
    base, tuned = random_model("llama"), random_model("llama", seed=1)
    walker, base_walker = Walker(tuned), Walker(base)
    answer = base_walker.run(IDS).logits.argmax(-1)
    old = Examples(IDS, answer, torch.tensor([[7, 8, 9]] * 6), AT, {}, IDS, AT)
    new = Prompts(IDS, answer[:, None], answer, torch.tensor([[7, 8, 9]] * 6))
    circuit = Circuit((Group("fetch", "last", "logits", None, ((2, 0), (1, 3), (0, 1))),), 3, 4)
    settings = SimpleNamespace(random_circuits=1, clauses="every")
    means = mean_outputs(walker, IDS, MEMORY)
    whole = evaluate(walker, means, circuit, circuit, old, new, settings, 0, Resources(1, MEMORY))
    of_base, of_tuned = (scores(m, circuit.nodes, IDS, old, new, MEMORY) for m in (base, tuned))
    found = record(3, of_tuned)
    errors = [abs((found["circuit"][key] or 0.0) - (expected or 0.0)) for key, expected in whole["circuit"].items()]
    print("largest error", max(errors))
    assert found["circuit"].keys() == whole["circuit"].keys() and max(errors) < 1e-12
    assert found["circuit"]["logit_difference"] != of_base["kept"]["logit_difference"]  # the models differ
    for key in ("old_accuracy", "old_logit_difference", "new_accuracy"):
        assert found[key] == pytest.approx(whole[key], abs=1e-12)
    assert of_base["new_accuracy"] == 1.0
    assert record(0, of_tuned)["circuit"] is None


@pytest.fixture(scope="module")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Cells:
    root = tmp_path_factory.mktemp("matchings")
    EXPERIMENT.write(root)
    return read_cells(root / "reports/cells", EXPERIMENT.seeds, EXPERIMENT.arms)


def test_the_primary_checkpoint_is_read_from_evaluate(cells: Cells) -> None:
    whole = cells.record("evaluate", "grpo", "0")
    assert value(cells, "grpo", "0", "accuracy_0_9", "retention") == whole["circuit"]["retention"]
    assert value(cells, "grpo", "0", "kl_0_5", "old_accuracy") == whole["old_accuracy"]
    other = cells.record("matchings", "grpo", "0")["matchings"]["norm_3"]["0.0003"]
    gentle = cells.record("matchings", "grpo", "0")["matchings"]["accuracy_0_9"]["0.0001"]
    assert value(cells, "grpo", "0", "accuracy_0_9", "retention", "0.0001") == gentle["circuit"]["retention"]
    assert value(cells, "grpo", "0", "accuracy_0_9", "retention", "0.0003") == whole["circuit"]["retention"]
    assert value(cells, "noise", "0", "accuracy_0_9", "retention", "0.0001") is None  # it is at one rate alone
    assert value(cells, "grpo", "0", "norm_3", "retention") == other["circuit"]["retention"]
    assert other["circuit"]["retention"] != whole["circuit"]["retention"]
    assert value(cells, "grpo", "1", "accuracy_0_9", "retention") is None  # not reached
    assert value(cells, "grpo", "3", "norm_3", "retention") is None  # no circuit in the base
    assert value(cells, "grpo", "3", "norm_3", "old_accuracy") is not None


def test_a_sham_does_not_make_a_level_a_selection(tmp_path: Path) -> None:
    arms = ("sft_gold", "grpo", "random_reward")
    experiment = Experiment(
        seeds=range(2), arms=arms, unreached=frozenset({("random_reward", 0), ("random_reward", 1)})
    )
    experiment.write(tmp_path)
    cells = read_cells(tmp_path / "reports/cells", experiment.seeds, arms)
    plan = replace(PLAN, controls=())
    found = {entry["name"]: entry for entry in compare_matchings(cells, plan)}["accuracy_0_9"]
    assert (found["reached"], found["of"], found["selected"]) == (4, 4, False)
    assert found["arms"]["random_reward"]["reached"] == 0


def test_what_circuits_do_alone_is_stated_as_accuracy(cells: Cells) -> None:
    frame = circuits_and_nulls(cells)
    record = cells.record("evaluate", "grpo", "0")
    part = frame[(frame["model"] == "grpo") & (frame["seed"] == "0")]
    of = {kind: rows["accuracy"].tolist() for kind, rows in part.groupby("kind")}
    assert of["whole model"] == [record["old_accuracy"]] and of["base circuit"] == [record["circuit"]["accuracy"]]
    assert of["random"] == [share * record["old_accuracy"] for share in record["random"]["faithfulness"]]


def test_random_circuits_of_a_model_that_answers_nothing(tmp_path: Path) -> None:
    """Shares of nothing are undefined, and are no points of the figure."""
    experiment = Experiment(seeds=(0,), arms=("sft_gold", "grpo"))
    experiment.write(tmp_path)
    path = tmp_path / "reports/cells/evaluate/grpo/0.json"
    record = json.loads(path.read_text())
    record["old_accuracy"], record["random"]["faithfulness"] = 0.0, [None] * 20
    path.write_text(json.dumps(record))
    cells = read_cells(tmp_path / "reports/cells", experiment.seeds, experiment.arms)
    frame = circuits_and_nulls(cells)
    of_grpo = frame[frame["model"] == "grpo"]
    assert of_grpo[of_grpo["kind"] == "whole model"]["accuracy"].tolist() == [0.0]
    assert "random" not in set(of_grpo["kind"]) and "random" in set(frame[frame["model"] == "base"]["kind"])


def test_every_matching_by_hand(cells: Cells) -> None:
    found = {entry["name"]: entry for entry in compare_matchings(cells, PLAN)}
    assert list(found) == ["accuracy_0_6", "accuracy_0_8", "accuracy_0_9", "kl_0_5", "kl_2", "norm_3", "steps_160"]
    assert [name for name, entry in found.items() if entry["primary"]] == ["accuracy_0_9"]
    # noise is no run that could get anywhere; one of eight trained runs misses the level
    assert {name: (e["reached"], e["of"]) for name, e in found.items()}["accuracy_0_9"] == (7, 8)
    assert {name for name, entry in found.items() if entry["selected"]} == {"accuracy_0_9", "kl_0_5", FAR}
    assert found[FAR]["arms"]["grpo"]["reached"] == 0 and found[FAR]["arms"]["grpo"]["retention"]["mean"] is None

    records = [cells.record("matchings", arm, "0")["matchings"]["norm_3"]["0.0003"] for arm in ("grpo", "sft_gold")]
    entry = found["norm_3"]
    entries = [cells.record("matchings", "grpo", s)["matchings"]["norm_3"]["0.0003"] for s in "012"]
    kept = [found["circuit"]["retention"] for found in entries]
    grpo = entry["arms"]["grpo"]["retention"]
    assert (grpo["n"], entry["arms"]["grpo"]["reached"]) == (3, 4)  # seed 3 has no circuit to keep
    assert grpo["mean"] == pytest.approx(np.mean(kept)) and grpo["ci"] == pytest.approx(t_interval(kept, 0.95))
    first = entry["contrasts"][0]
    difference = records[0]["circuit"]["retention"] - records[1]["circuit"]["retention"]
    assert first["retention"]["values"]["0"] == pytest.approx(difference, abs=1e-15)
    assert sorted(first["old_accuracy"]["values"]) == ["0", "1", "2"]
    assert sorted(found["accuracy_0_9"]["contrasts"][0]["retention"]["values"]) == ["0", "2"]
    assert entry["arms"]["grpo"]["picked"] == {
        "new_accuracy": pytest.approx(0.91),
        "kl_new": pytest.approx(0.52),
        "weight_norm": pytest.approx(3.05),
        "gradient_steps": 45.0,
    }


def test_the_table_of_the_figure_has_every_number_once(cells: Cells) -> None:
    entries = compare_matchings(cells, PLAN)
    table = long_table(entries, EXPERIMENT.arms)
    numbers = sum(entry["arms"][arm]["retention"]["n"] for entry in entries for arm in EXPERIMENT.arms)
    assert len(table.dropna(subset=["retention"])) == numbers
    assert len(table.drop_duplicates(["by", "at", "arm", "seed"])) == len(table)
    assert set(table["at"]) == {entry["at"] for entry in entries}  # kl_2, where nobody is, too


def _by_grid(points: np.ndarray, reference: tuple[float, float], n: int) -> float:
    """Share of the cells of a fine grid on the unit square, above the reference, whose centre a point dominates."""
    centres = (np.arange(n) + 0.5) / n
    x, y = np.meshgrid(centres, centres, indexing="ij")
    covered = ((points[:, 0, None, None] >= x) & (points[:, 1, None, None] >= y)).any(0)
    return float((covered & (x > reference[0]) & (y > reference[1])).sum()) / n**2


def test_hypervolume_against_a_grid() -> None:
    draw, n, largest = np.random.default_rng(0), 400, 0.0
    for size in (1, 2, 5, 30):
        for reference in ((0.0, 0.0), (0.4, 0.0), (0.3, 0.5)):
            points = np.round(draw.random((size, 2)), 1)  # on lines of the grid, with ties and doubles
            reference = (round(reference[0], 1), reference[1])
            error = abs(hypervolume(points, reference) - _by_grid(points, reference, n))
            largest = max(largest, error)
    print("largest error", largest)
    assert largest < 1e-12


def test_hypervolume_by_hand_and_its_properties() -> None:
    points = np.array([[0.6, 1.0], [1.0, 0.5], [0.5, 0.9]])  # the last one is dominated
    assert hypervolume(points, (0.2, 0.0)) == pytest.approx(0.4 * 1.0 + 0.4 * 0.5)
    for same in (points[:2], points[::-1]):
        assert hypervolume(same, (0.2, 0.0)) == pytest.approx(hypervolume(points, (0.2, 0.0)), abs=1e-12)
    assert hypervolume(points, (1.0, 0.0)) == 0.0
    more = np.vstack([points, [[0.8, 0.8]]])
    assert hypervolume(more, (0.2, 0.0)) == pytest.approx(0.6 + 0.2 * 0.3)


def test_hypervolume_of_arms() -> None:
    def curve(arm: str, seed: str, *points: tuple[float, float]) -> pd.DataFrame:
        steps = [(0, 0.4, 1.0), *((step, *point) for step, point in enumerate(points, start=1))]
        frame = pd.DataFrame(steps, columns=["step", "new_accuracy", "old_accuracy"])
        return frame.assign(arm=arm, seed=seed, learning_rate=0.1)

    curves = pd.concat(
        [
            curve("sft_gold", "0", (1.0, 0.5)),
            curve("grpo", "0", (0.7, 1.0), (1.0, 0.5)),
            curve("noise", "0", (0.4, 0.1)),
            curve("grpo", "1", (1.0, 1.0)),
            curve("sft_gold", "1", (0.3, 1.0)),
            curve("noise", "1", (0.3, 1.0)),
        ]
    )
    assert share_kept(curve("sft_gold", "0", (1.0, 1.0))) == pytest.approx(1.0)
    found = compare_hypervolumes(curves, PLAN, ["0"])  # the base of seed 1 does not count
    assert {arm: e["mean"] for arm, e in found["arms"].items()} == {
        "sft_gold": pytest.approx(0.5),
        "grpo": pytest.approx(0.75),
        "noise": 0.0,
    }
    assert [entry["mean"] for entry in found["contrasts"]] == [pytest.approx(0.25), pytest.approx(-0.5)]
    both = compare_hypervolumes(curves, PLAN, ["0", "1"])
    assert both["contrasts"][0]["values"] == {"0": pytest.approx(0.25), "1": pytest.approx(1.0)}
