"""Statistics against answers worked out by hand, and contrasts that say what they leave out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from stages import contrast as stage
from stages.pipeline.stage import Invalid
from stages.statistics.cells import Cells, long_form, read_cells
from stages.statistics.contrasts import Plan, compare
from stages.statistics.hierarchical import difference, hierarchical_interval, paired_outcomes
from stages.statistics.masks import table_of_masks
from stages.statistics.paired import (
    bootstrap_interval,
    detectable_difference,
    equivalence_p,
    holm,
    pairs_needed,
    power_note,
    provable_margin,
    resolution_note,
    sign_flip_p,
    smallest_sign_flip_p,
    t_interval,
    t_test_power,
)
from stages.statistics.retention import add_retention
from stages.statistics.wording import headline, number, verdict
from tests.synthetic_records import Experiment


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # sums 6 and -6 of the eight are as far out
        ([1.0, 2.0, -3.0], 1.0),  # sum 0: all eight are
        ([1.0, 2.0, 4.0, -1.0], 6 / 16),  # sums of at least 6: 8, 6 and 6, and their negatives
        ([0.0, 0.0], 1.0),
        ([0.3], 1.0),
        ([0.1] * 8, 2 / 256),
    ],
)
def test_sign_flip_by_hand(differences: list[float], expected: float) -> None:
    assert sign_flip_p(differences) == pytest.approx(expected, abs=1e-12)


def scipy_sign_flip_p(x: np.ndarray) -> float:
    """The test as scipy has it: slow, and over all patterns."""
    result = stats.permutation_test(
        (x, np.zeros_like(x)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",  # swaps a difference with its zero, which flips its sign
        n_resamples=2 ** len(x),  # all of them, so the p is exact
        vectorized=True,
    )
    return float(result.pvalue)


def test_sign_flip_against_scipy() -> None:
    """Differences without ties, with many (whole numbers), and of a scale where rounding shows (tenths)."""
    rng = np.random.default_rng(3)
    cases = [rng.normal(rng.normal(), 1.0, rng.integers(2, 11)) for _ in range(60)]
    cases += [rng.integers(-3, 5, rng.integers(2, 11)) / 1.0 for _ in range(60)]
    cases += [tenths / 10 for tenths in (rng.integers(1, 9, rng.integers(2, 10)) for _ in range(30))]
    errors = [abs((sign_flip_p(x) or 0.0) - scipy_sign_flip_p(x)) for x in cases]
    print("max error", max(errors))
    assert max(errors) <= 1e-12


def test_sign_flip_sees_ties_that_rounding_hides() -> None:
    """Tenths of whole numbers have the p of the whole numbers, also where they nearly cancel."""
    rng = np.random.default_rng(4)
    cases = [[1, 2, -3], *(rng.integers(-4, 5, 9).tolist() for _ in range(100))]
    assert sum([0.1, 0.2, -0.3]) != 0
    for whole in cases:
        assert sign_flip_p([value / 10 for value in whole]) == sign_flip_p([float(value) for value in whole]), whole


def test_sign_flip_of_many_pairs() -> None:
    assert sign_flip_p([0.1] * 29 + [-0.1]) == pytest.approx(62 / 2**30, abs=1e-15)  # none or one sign of 30 differs
    with pytest.raises(Invalid, match="41 pairs"):
        sign_flip_p([0.1] * 41)


def test_smallest_p_is_reached() -> None:
    for n in range(1, 11):
        assert sign_flip_p(np.arange(1, n + 1) / 7) == pytest.approx(smallest_sign_flip_p(n))


def test_nothing_without_data() -> None:
    assert sign_flip_p([]) is None and smallest_sign_flip_p(0) is None
    assert t_interval([1.0], 0.95) is None and bootstrap_interval([1.0], 0.95, 10, 0) is None
    assert equivalence_p([1.0], 0.1) is None


def test_holm_by_hand() -> None:
    # sorted .01 .02 .03 .04 times 4 3 2 1, made monotone: .04 .06 .06 .06
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])


def test_holm_against_statsmodels() -> None:
    rng = np.random.default_rng(5)
    families = [rng.integers(0, 20, rng.integers(1, 8)) / 20 for _ in range(5)]
    errors = [np.abs(np.array(holm(p.tolist())) - multipletests(p, method="holm")[1]).max() for p in families]
    print("max error", max(errors))
    assert max(errors) <= 1e-15


def test_holm_counts_what_could_not_be_tested() -> None:
    assert holm([0.01, None, 0.04]) == [pytest.approx(0.03), None, pytest.approx(0.08)]
    assert holm([]) == []


def test_t_interval_by_hand() -> None:
    # mean 2, sd 1, n 3, t(.975, 2) = 4.302653
    low, high = t_interval([1.0, 2.0, 3.0], 0.95) or (0.0, 0.0)
    assert (low, high) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), abs=1e-6)


def test_equivalence_is_two_one_sided_tests() -> None:
    x = np.random.default_rng(1).normal(0.01, 0.03, 8)
    above = stats.ttest_1samp(x, -0.05, alternative="greater")
    below = stats.ttest_1samp(x, 0.05, alternative="less")
    assert equivalence_p(x, 0.05) == pytest.approx(np.max([above[1], below[1]]), abs=1e-12)
    assert equivalence_p([0.01, 0.01], 0.05) == 0.0 and equivalence_p([0.2, 0.2], 0.05) == 1.0


@pytest.mark.parametrize("n", [3, 8])
def test_coverage_of_the_interval(n: int) -> None:
    """Of 400 data sets: 95 % of the t intervals hold the mean, fewer bootstrap ones."""
    draws = np.random.default_rng(n).normal(1.0, 0.5, (400, n))
    covered = np.mean([low <= 1 <= high for low, high in (t_interval(x, 0.95) or (0, 0) for x in draws)])
    short = [bootstrap_interval(x, 0.95, 300, 0) or (0, 0) for x in draws]
    print("t", covered, "bootstrap", np.mean([low <= 1 <= high for low, high in short]))
    assert 0.91 <= covered <= 0.985
    assert np.mean([low <= 1 <= high for low, high in short]) < covered


def test_power_note() -> None:
    assert pairs_needed(0.05, 1) == 6 and pairs_needed(0.05, 6) == 8
    assert "0.2500, so a single contrast cannot" in power_note(3, 0.05, 6)
    assert "0.0078, so a single contrast can" in power_note(8, 0.05, 6)
    assert "nothing can be tested" in power_note(0, 0.05, 6)


def test_power_of_the_t_test_against_statsmodels() -> None:
    errors = [
        abs(t_test_power(effect, n, level, two_sided) - TTestPower().power(effect, n, level, alternative=alternative))
        for effect in (0.0, 0.3, 1.0)
        for n in (2, 3, 8, 30)
        for level in (0.05, 0.01)
        for two_sided, alternative in ((True, "two-sided"), (False, "larger"))
    ]
    print("max error", max(errors))
    assert max(errors) <= 2e-6


@pytest.mark.parametrize("n", [2, 3, 8])
def test_detectable_difference_and_provable_margin(n: int) -> None:
    """Of 20,000 simulated sets of pairs, 80 % detect the one and are equal within the other."""
    sd = 0.03
    detectable, margin = detectable_difference(n, sd, 0.05, 0.8), provable_margin(n, sd, 0.05, 0.8)
    assert detectable is not None and margin is not None
    x = np.random.default_rng(n).normal(0, sd, (20000, n))
    errors = x.std(axis=1, ddof=1) / n**0.5
    found = np.mean(np.abs(x.mean(axis=1) + detectable) / errors > stats.t.ppf(0.975, n - 1))
    equal = np.mean(np.abs(x.mean(axis=1)) + stats.t.ppf(0.95, n - 1) * errors < margin)
    print(f"n = {n}: {detectable:.3f} detected in {found:.3f}, equal within {margin:.3f} in {equal:.3f}")
    assert found == pytest.approx(0.8, abs=0.01) and 0.79 <= equal <= (0.89 if n == 2 else 0.85)
    assert detectable_difference(1, sd, 0.05, 0.8) is None and resolution_note(1, sd, 0.05, 0.8, "H1") == ""


PLAN = Plan(
    "evaluate.circuit.retention", ("drift.old.kl",), 0.9, (("grpo", "sft_gold"),), (), (), 0.95, 0.05, 0.8, 0.05, 500, 0
)


def _compared(root: Path, experiment: Experiment, plan: Plan = PLAN) -> dict:
    experiment.write(root)
    cells = read_cells(root / "reports/cells", experiment.seeds, experiment.arms)
    return compare(cells, plan)


def test_pairs_that_do_not_count_are_named(tmp_path: Path) -> None:
    experiment = Experiment(
        seeds=range(5), arms=("sft_gold", "grpo"), unreached=frozenset({("grpo", 1)}), hidden=frozenset({4})
    )
    found = _compared(tmp_path, experiment)
    primary, drift = found["contrasts"]
    assert sorted(primary["values"]) == ["0", "2", "3"] and primary["n"] == 3
    assert primary["excluded"] == [
        {"seed": "1", "reason": "level not reached by", "models": ["grpo"]},
        {"seed": "4", "reason": "base left out", "models": ["base"], "faithfulness": None},
    ]
    assert drift["n"] == 3  # the drift of seed 4 is known, but not compared either
    assert found["bases_left_out"] == [{"seed": "4", "faithfulness": None}] and found["n_pairs"] == 4
    assert found["reach"]["grpo"] == {"reached": 4, "of": 5}
    grpo = found["measures"]["evaluate.circuit.retention"]["grpo"]
    assert [entry["reason"] for entry in grpo["excluded"]] == ["level not reached", "base left out"]
    kept, of_reference, of_base = (
        json.loads((tmp_path / f"reports/cells/evaluate/{model}/0.json").read_text())["circuit"]["accuracy"]
        for model in ("grpo", "sft_gold", "base")
    )
    difference = (kept - of_reference) / of_base
    assert primary["values"]["0"] == pytest.approx(difference, abs=1e-15)
    assert primary["difference"] == pytest.approx(primary["arm_mean"] - primary["reference_mean"])


def test_weak_bases_count_in_no_contrast(tmp_path: Path) -> None:
    """Left out below the threshold; at it, a base counts."""
    experiment = Experiment(seeds=range(3), arms=("sft_gold", "grpo"), weak=frozenset({1}))
    found = _compared(tmp_path, experiment)
    faithfulness = json.loads((tmp_path / "reports/cells/evaluate/base/1.json").read_text())["circuit"]["faithfulness"]
    assert found["bases_left_out"] == [{"seed": "1", "faithfulness": faithfulness}]
    assert all(sorted(entry["values"]) == ["0", "2"] for entry in found["contrasts"])
    for model in ("base", "grpo"):
        assert found["measures"]["evaluate.circuit.retention"][model]["n"] == 2
    lenient = _compared(tmp_path, experiment, replace(PLAN, base_faithfulness=faithfulness))
    assert lenient["bases_left_out"] == [] and lenient["contrasts"][0]["n"] == 3


def test_a_measure_that_is_undefined_is_named(tmp_path: Path) -> None:
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "grpo"))
    experiment.write(tmp_path)
    path = tmp_path / "reports/cells/evaluate/grpo/1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"circuit": None}))
    cells = read_cells(tmp_path / "reports/cells", experiment.seeds, experiment.arms)
    primary = compare(cells, PLAN)["contrasts"][0]
    assert primary["excluded"] == [{"seed": "1", "reason": "undefined for", "models": ["grpo"]}]


def naive_hierarchical(seeds: list[np.ndarray], resamples: int) -> list[float]:
    """Means of the resamples, one example after another."""
    rng = np.random.default_rng(0)
    means = []
    for _ in range(resamples):
        differences = []
        for chosen in rng.integers(len(seeds), size=len(seeds)):
            arm, arm_of, reference, reference_of = seeds[chosen]
            drawn = rng.integers(len(arm), size=len(arm))
            first = arm[drawn].sum() / arm_of[drawn].sum()
            differences.append(first - reference[drawn].sum() / reference_of[drawn].sum())
        means.append(float(np.mean(differences)))
    return means


def test_hierarchical_bootstrap_against_drawing_examples() -> None:
    rng = np.random.default_rng(8)
    shares = np.array([0.8, 0.95, 0.6, 0.9])[:, None]
    seeds = [rng.random((4, 40)) < shares + rng.normal(0, 0.04, (4, 1)) for _ in range(4)]
    expected = np.quantile(naive_hierarchical(seeds, 4000), [0.05, 0.95])
    found = hierarchical_interval(seeds, 0.9, 20000, 0)
    error = np.abs(np.array(found) - expected).max()
    print("max error", error, "of an interval as wide as", np.ptp(expected))
    assert error < 0.04 * np.ptp(expected)
    assert hierarchical_interval(seeds[:1], 0.9, 100, 0) is None
    assert hierarchical_interval(seeds, 0.9, 100, 0) == hierarchical_interval(seeds, 0.9, 100, 0)


def test_outcomes_are_paired_by_example(tmp_path: Path) -> None:
    """Retention is a share of the base's, faithfulness of the model's own; without outcomes there is no interval."""
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "grpo"))
    assert _compared(tmp_path, experiment)["contrasts"][0]["ci_hierarchical"] is not None
    cells = read_cells(tmp_path / "reports/cells", experiment.seeds, experiment.arms)
    text = {model: cells.record("evaluate", model, "0")["examples"] for model in cells.models}
    rows = paired_outcomes(cells, PLAN.primary, "grpo", "sft_gold", "0")
    assert rows is not None and not (rows[1] ^ rows[3]).any()
    kept, gold, base = (text[model]["circuit"].count("1") for model in ("grpo", "sft_gold", "base"))
    assert difference(rows) == pytest.approx((kept - gold) / base, abs=1e-15)
    own = paired_outcomes(cells, "evaluate.circuit.faithfulness", "grpo", "sft_gold", "0")
    assert own is not None and own[1].sum() == text["grpo"]["model"].count("1")
    assert paired_outcomes(cells, "drift.new.kl", "grpo", "sft_gold", "0") is None
    assert paired_outcomes(cells, "evaluate.circuit.retention_ld", "grpo", "sft_gold", "0") is None


def test_what_takes_two_records_by_hand(tmp_path: Path) -> None:
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "grpo"), hidden=frozenset({1}))
    experiment.write(tmp_path)
    cells = read_cells(tmp_path / "reports/cells", experiment.seeds, experiment.arms)
    base, tuned = (cells.record("evaluate", model, "0") for model in ("base", "grpo"))
    assert base["circuit"]["retention"] == base["circuit"]["retention_ld"] == 1.0
    assert base["flips"] == {"lost": 0.0, "gained": 0.0}
    for circuit in ("circuit", "own_circuit"):
        assert tuned[circuit]["retention"] == tuned[circuit]["accuracy"] / base["circuit"]["accuracy"] < 1
    before, after = (np.array([*entry["examples"]["model"]]) == "1" for entry in (base, tuned))
    assert tuned["flips"] == {"lost": np.mean(before & ~after), "gained": np.mean(~before & after)}
    assert tuned["flips"]["lost"] > 0
    matched = cells.record("matchings", "grpo", "0")["matchings"]["norm_3"]["0.0003"]["circuit"]
    assert matched["retention"] == matched["accuracy"] / base["circuit"]["accuracy"]
    assert cells.record("evaluate", "grpo", "1")["circuit"] is None, "no circuit in this base"
    base["circuit"]["logit_difference"] = 0.0
    add_retention(cells.records, "base")
    assert tuned["circuit"]["retention_ld"] is None, "a share of nothing"


def test_no_pair_at_all(tmp_path: Path) -> None:
    hidden = Experiment(seeds=(0,), arms=("sft_gold", "grpo"), hidden=frozenset({0}))
    entry = _compared(tmp_path, hidden)["contrasts"][0]
    assert entry["n"] == 0 and entry["difference"] is None and entry["p"] is None and entry["ci"] is None


def test_a_missing_cell_is_an_error(tmp_path: Path) -> None:
    experiment = Experiment(arms=("sft_gold", "grpo"))
    experiment.write(tmp_path)
    (tmp_path / "reports/cells/cmap/grpo/2.json").unlink()
    with pytest.raises(Invalid, match="cmap/grpo/2.json is missing"):
        read_cells(tmp_path / "reports/cells", (0, 1, 2), experiment.arms)


def test_leftovers_are_not_read(tmp_path: Path) -> None:
    Experiment(seeds=(0, 1), arms=("sft_gold", "grpo", "noise")).write(tmp_path)
    cells = read_cells(tmp_path / "reports/cells", (0,), ["grpo"])
    frame = long_form(cells)
    assert set(frame["seed"]) == {"0"} and set(frame["model"]) == {"base", "grpo"}
    row = frame[(frame.stage == "evaluate") & (frame.model == "grpo") & (frame.measure == "circuit.retention")]
    assert row["value"].item() == cells.value("evaluate.circuit.retention", "grpo", "0")


def test_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(seeds=(0,), arms=("sft_gold", "grpo"), contrasts=(("grpo", "sft_gold"),))
    experiment.write(tmp_path)
    stage.main(experiment.cell("contrast"))
    rows = pd.read_csv("reports/cells.csv")
    assert not rows["measure"].str.startswith("examples").any()
    assert list(rows) == ["stage", "model", "seed", "measure", "value"]
    assert {"match", "matchings", "discover", "evaluate", "dcm", "cmap", "drift", "pretrain"} == set(rows["stage"])
    first = Path("reports/statistics.json").read_bytes() + Path("reports/cells.csv").read_bytes()
    stage.main(experiment.cell("contrast"))
    assert Path("reports/statistics.json").read_bytes() + Path("reports/cells.csv").read_bytes() == first
    wrong = experiment.cell("contrast")
    wrong.params("contrast").primary_measure = "evaluate.circuit.retentoin"
    with pytest.raises(Invalid, match="retentoin"):
        stage.main(wrong)


def _headline(values: list[float], excluded: int = 0, family: int = 1) -> tuple[str, str]:
    p = sign_flip_p(values)
    entry = {
        "arm": "grpo",
        "reference": "sft_gold",
        "n": len(values),
        "difference": float(np.mean(values)) if values else None,
        "arm_mean": 0.8 + float(np.mean(values)) if values else None,
        "reference_mean": 0.8 if values else None,
        "ci": t_interval(values, 0.95),
        "p": p,
        "p_holm": None if p is None else min(1.0, family * p),
        "p_equivalent": equivalence_p(values, 0.05),
        "smallest_possible_p": smallest_sign_flip_p(len(values)),
        "excluded": [{"seed": str(s), "reason": "level not reached by", "models": ["grpo"]} for s in range(excluded)],
    }
    plan = {"primary": PLAN.primary, "alpha": 0.05, "confidence": 0.95, "equivalence_margin": 0.05}
    return verdict(entry, 0.05), headline(entry, {"grpo": "GRPO", "sft_gold": "SFT"}, plan, 0.9)


@pytest.mark.parametrize(
    ("values", "kind", "says"),
    [
        ([0.1, 0.12, 0.09, 0.11, 0.13, 0.1], "clear", "GRPO kept more of the old task's circuit than SFT"),
        (
            [-0.1, -0.12, -0.09, -0.11, -0.13, -0.1],
            "clear",
            "SFT kept more of the old task's circuit than GRPO",
        ),
        ([0.1, 0.11, 0.12], "suggestive", "A hint, not a finding, that GRPO"),
        ([0.1, -0.11, 0.12], "undecided", "Not decided"),
        ([0.01, -0.01, 0.0, 0.005], "equivalent", "equally much"),
        ([0.1], "one pair", "a single pair"),
        ([], "no pair", "No answer"),
    ],
)
def test_the_headline_says_what_the_data_allow(values: list[float], kind: str, says: str) -> None:
    found, sentence = _headline(values)
    assert found == kind and says in sentence
    assert number(None) not in sentence and "None" not in sentence


def test_the_headline_names_what_is_left_out() -> None:
    assert "2 pairs left out" in _headline([0.1, 0.11, 0.12], excluded=2)[1]
    assert "seed 0: level not reached by GRPO" in _headline([], excluded=1)[1]


def test_correction_can_take_a_clear_difference_back() -> None:
    values = [0.1, 0.12, 0.09, 0.11, 0.13, 0.1]
    assert _headline(values)[0] == "clear" and _headline(values, family=6)[0] == "suggestive"


def test_masks_of_base_and_tuned_model_by_hand() -> None:
    """Two of four heads; a mask of all heads and one that carries nothing are not compared."""
    a, b, c, d = heads = [[0, 0], [0, 1], [1, 0], [1, 1]]

    def scores(order: list[list[int]]) -> dict[str, Any]:
        score = {"size": 4, "order": order, "accuracy": 0.9, "selected": order[:2]}
        return {"g": {"half": score, "all": score | {"selected": order}, "nothing": score | {"accuracy": 0.3}}}

    again = {"g": dict.fromkeys(("half", "all", "nothing"), [a, b, c, d])}
    records = {
        ("dcm", "base", "0"): {"groups": scores(heads), "again": again},
        ("dcm", "grpo", "0"): {"groups": scores([b, c, a, d])},
        ("match", "grpo", "0"): {"reached": True},
        ("match", "noise", "0"): {"reached": False},
    }
    rows = table_of_masks(Cells(("0",), ("grpo", "noise"), records, ()))
    assert rows == [
        {"arm": "grpo", "masks": 1, "share": 0.5, "chance": 0.5, "ceiling": 1.0},
        {"arm": "noise", "masks": 0, "share": None, "chance": None, "ceiling": None},
    ]


def test_numbers_in_words() -> None:
    assert number(-0.0001) == "0.000" and number(-0.0001, signed=True) == "+0.000"
    assert number(-0.25, 2) == "−0.25" and number(None) == "–"
