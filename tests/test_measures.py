"""Measures by name: the four scores and their shares, which names params may give, and what the primary one decides."""

import csv
import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from stages.circuits.ablation import mean_outputs
from stages.circuits.circuit import Circuit, Group, Node
from stages.circuits.precision import rank_agreement
from stages.circuits.scores import Metric, score
from stages.circuits.walker import Walker
from stages.cmap import patch_both_ways
from stages.evaluate import circuit_by_ablation, evaluate, inspect_circuit
from stages.measures.checkpoints import record, scores
from stages.measures.relearning import relearn, whole_scores
from stages.measures.scores import score_of, shares
from stages.pipeline.params.measures import MEASURES, is_measure
from stages.pipeline.resources import Resources
from stages.statistics.cells import Cells, read_cells
from stages.statistics.contrasts import compare, left_out_bases
from stages.statistics.primary import above_chance, base_measure, random_floor
from stages.statistics.retention import add_retention
from stages.statistics.summary import plan_of
from stages.tasks.examples import Examples, Prompts
from stages.tasks.old.boxes import Boxes
from tests.oracles import random_model
from tests.synthetic_records import Experiment
from tests.test_ablation import IDS, MEMORY
from tests.test_matchings import PLAN

REPORTS = Path(__file__).parent.parent / "reports"
WITH_DOTS = r"\.by_learning_rate\.|\.per_matrix(_relative)?\.|^matchings\."  # names of rates and matrices in the path


def committed() -> set[str]:
    """Measures that a tuned model has in a committed report; "*" for a part that is a name with dots, a rate or the
    name of a matrix."""
    found = set()
    for file in [REPORTS / "cells.csv", *REPORTS.glob("*/cells.csv")]:
        with file.open() as lines:
            for row in csv.DictReader(lines):
                if row["model"] != "base" and row["value"]:
                    found.add(f"{row['stage']}.{row['measure']}")
    return {path for path in found if not re.search(WITH_DOTS, path)}


def made_here() -> set[str]:
    """Measures of records that stages make of random models."""
    base, tuned = Walker(random_model("llama")), Walker(random_model("llama", seed=1))
    last = IDS.shape[1] - 1
    at = {name: torch.full((6,), last - place) for place, name in enumerate([*Boxes.positions][::-1])}
    answer, others = base.run(IDS).logits.argmax(-1), torch.tensor([[7, 8, 9]] * 6)
    every = {
        name: torch.stack([at[name], at[name] - 6], 1)
        for name in ("earlier_label", "earlier_object", "earlier_separator")
    }
    old = Examples(IDS, answer, others, at, every, IDS.flip(0), at)
    new = Prompts(IDS, answer[:, None], answer, others)
    circuit = Circuit((Group("fetch", "last", "logits", None, ((2, 0), (1, 3), (0, 1))),), 3, 4)
    settings = SimpleNamespace(random_circuits=1, clauses="every", random_subsets=1, greedy_steps=1, greedy_examples=2)
    settings.score, settings.prune_threshold, settings.knockout_window = "logit_difference", 0.01, 1
    available = Resources(1, MEMORY)
    ranking = [Node(layer, head, "last") for layer in range(3) for head in range(4)]
    records: dict[tuple[str, str, str], Any] = {}
    for name, walker in (("base", base), ("grpo", tuned)):
        means = mean_outputs(walker, IDS, MEMORY)
        evaluated = evaluate(walker, means, circuit, circuit, old, new, settings, 0, available)
        generator = np.random.default_rng(0)
        evaluated["inspection"] = inspect_circuit(walker, means, old, circuit, ranking, settings, generator, available)
        base_means = mean_outputs(base, IDS, MEMORY)
        evaluated["circuit_by_ablation"] = circuit_by_ablation(
            walker, base, base_means, circuit, old, evaluated, "every", available
        )
        records["evaluate", name, "0"] = evaluated
    at_norm = record(3, scores(tuned.model, circuit.nodes, IDS, old, new, MEMORY))
    records["matchings", "grpo", "0"] = {"matchings": {"norm_3": at_norm}}
    sets = {"fetch": circuit.nodes, "circuit": circuit.nodes}
    records["cmap", "grpo", "0"] = patch_both_ways(
        base, tuned, old, sets, 1, MEMORY, np.random.default_rng(0), inputs=("q", "k", "v")
    )
    clean, corrupt = torch.ones(6), torch.zeros(6)
    exact, rounded = (score(Metric.LOGIT_DIFFERENCE, torch.rand(3, 4, 6), clean, corrupt) for _ in range(2))
    records["discover", "grpo", "0"] = {"precision": rank_agreement(exact, rounded, 6, 0.1)}
    again = relearn(tuned.model, old, old, 1.1, 1, 1e-3, (0.9, 0.999), 0.0)
    records["drift", "grpo", "0"] = {"relearning": vars(again), "retraced": whole_scores(tuned.model, old)}
    add_retention(records, "base")
    return {
        f"{stage}.{path}"
        for (stage, model, _), kept in records.items()
        if model != "base"
        for path in _numbers(kept, "")
    }


def _numbers(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            yield from _numbers(part, f"{path}.{key}" if path else key)
    elif isinstance(value, int | float) or value is None:
        yield path


def test_the_measures_of_the_params_are_those_that_records_hold() -> None:
    """Of every stage: all that a committed record has are known, and all that are known are in a record."""
    held = committed() | {path for path in made_here() if not re.search(WITH_DOTS, path)}
    no_numbers = re.compile(r"match\.like|.*\.size_curve\.share(_\w+)?")  # where they are defined
    unknown = sorted(path for path in held if not is_measure(path) and not no_numbers.fullmatch(path))
    patterns = {path: re.compile(re.escape(path).replace(r"\*", r"[^.]+")) for path in MEASURES}
    nowhere = [path for path, pattern in patterns.items() if not any(map(pattern.fullmatch, held))]
    print(f"{len(MEASURES)} measures, {len(held)} numbers of records")
    assert not unknown and not nowhere
    assert not is_measure("evaluate.circuit.retentoin") and not is_measure("evaluate.circuit")
    assert not is_measure("evaluate.groups.fetch.more.size") and is_measure("evaluate.groups.v_label>k_last.size")


def test_shares_by_hand() -> None:
    part = {"accuracy": 0.3, "candidate_accuracy": 0.6, "logit_difference": -1.0, "p_correct": 0.1}
    whole = {"accuracy": 0.6, "candidate_accuracy": 0.8, "logit_difference": 2.0, "p_correct": 0.0}
    assert shares("kept", part, whole) == {
        "kept": 0.5,
        "kept_candidates": pytest.approx(0.75),
        "kept_ld": -0.5,
        "kept_p": None,
    }
    assert shares("kept", {"accuracy": 0.3}, whole) == {"kept": 0.5}


@pytest.mark.parametrize(
    ("primary", "score", "base"),
    [
        ("evaluate.circuit.retention", "accuracy", "evaluate.circuit.faithfulness"),
        ("evaluate.circuit.retention_ld", "logit_difference", "evaluate.circuit.faithfulness_ld"),
        ("evaluate.circuit.candidate_accuracy", "candidate_accuracy", "evaluate.circuit.faithfulness_candidates"),
        ("evaluate.old_p_correct", "p_correct", "evaluate.circuit.faithfulness_p"),
        ("cmap.tuned_to_base.circuit.logit_difference", "logit_difference", "evaluate.circuit.faithfulness_ld"),
        ("drift.relearning.steps", "accuracy", "evaluate.circuit.faithfulness"),
    ],
)
def test_a_base_counts_by_the_score_of_the_primary_measure(primary: str, score: str, base: str) -> None:
    assert is_measure(primary) and score_of(primary) == score and base_measure(primary) == base
    assert is_measure(base)


@pytest.fixture
def cells(tmp_path: Path) -> Cells:
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "grpo", "noise"), weak=frozenset({1}))
    experiment.write(tmp_path)
    return read_cells(tmp_path / "reports/cells", experiment.seeds, experiment.arms)


def test_which_bases_are_left_out_depends_on_the_primary_measure(cells: Cells) -> None:
    """The weak base has little accuracy in place and all of the logit difference."""
    assert list(left_out_bases(cells, PLAN)) == ["1"]
    by_difference = replace(PLAN, primary="evaluate.circuit.retention_ld")
    assert left_out_bases(cells, by_difference) == {}
    for seed in cells.seeds:
        assert cells.value("evaluate.circuit.faithfulness_ld", "base", seed) == 1.0
        cells.record("evaluate", "base", seed)["circuit"]["faithfulness_ld"] = 0.7
    assert left_out_bases(cells, by_difference) == {"0": 0.7, "1": 0.7}


def test_the_floor_is_in_the_unit_of_the_primary_measure(cells: Cells) -> None:
    record = cells.record("evaluate", "base", "0")
    record["circuit"] |= {"faithfulness_candidates": 0.8, "candidate_accuracy": 0.72}
    record["random"]["faithfulness_candidates"] = [0.2, 0.4]
    assert random_floor(cells, "evaluate.circuit.faithfulness_candidates", ["0"]) == pytest.approx(0.3)
    assert random_floor(cells, "evaluate.circuit.retention_candidates", ["0"]) == pytest.approx(0.3 / 0.8)
    assert random_floor(cells, "evaluate.circuit.retention_p", ["0"]) is None
    assert above_chance(cells, "0", "candidate_accuracy") == [0.2, 0.4]  # the record does not say what guessing scores
    record |= {"old_candidate_accuracy": 0.9, "old_chance": 0.18}
    assert above_chance(cells, "0", "candidate_accuracy") == pytest.approx([0.0, 0.25])


def test_statistics_of_records_that_have_fewer_scores(tmp_path: Path) -> None:
    """The contrasts of a committed report come out of its records as they did, and the new measures have no number."""
    folder = REPORTS / "pilot_settled"
    for archive in sorted((folder / "records").iterdir()):
        with tarfile.open(archive) as packed:
            packed.extractall(tmp_path, filter="data")
    committed = json.loads((folder / "statistics.json").read_text())
    params = yaml.safe_load((folder / "params.yaml").read_text())
    cells = read_cells(tmp_path / "reports/cells", params["seeds"], params["arms"])
    plan = plan_of(committed)
    assert compare(cells, replace(plan, resamples=10))["measures"] == committed["measures"]
    assert random_floor(cells, plan.primary, list(cells.seeds)) == pytest.approx(
        json.loads((folder / "summary.json").read_text())["random_floor"], abs=1e-12
    )
    for measure in ("evaluate.circuit.retention_candidates", "evaluate.circuit.p_correct"):
        assert is_measure(measure) and all(
            cells.value(measure, m, s) is None for m in cells.models for s in cells.seeds
        )
