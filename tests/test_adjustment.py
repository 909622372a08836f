"""Adjustment for distance against models with one dummy variable a seed, and against what was planted."""

from statistics import correlation

import numpy as np
import pandas as pd
import pytest
from statsmodels.formula.api import ols

from stages.statistics.adjustment import Adjustment, adjust, fit, left_out_r2
from stages.statistics.cells import Cells
from stages.statistics.paired import t_interval
from stages.statistics.wording import adjustment_sentences

ARMS = ("grpo", "reinforce", "sft_gold", "self_sft", "noise")
ASKED = Adjustment(
    outcome="evaluate.circuit.retention",
    distance="drift.new.kl",
    families={"RL": ["grpo", "reinforce", "rloo"], "SFT": ["sft_gold", "self_sft"]},
    contrasts=(("grpo", "sft_gold"),),
    forgetting="evaluate.old_accuracy",
    predictors=("drift.old.kl", "drift.new.kl", "evaluate.circuit.retention"),
    confidence=0.95,
)
NAMES = {arm: f"[{arm}]" for arm in ARMS}


def experiment(n: int, effect: float = 0.03, per_nat: float = -0.1, noise: float = 0.01) -> Cells:
    """RL moves less, keeps `effect` more at the same distance, and old-task accuracy falls with KL on old prompts."""
    rng = np.random.default_rng(n)
    seeds, records = tuple(str(seed) for seed in range(n)), {}
    for seed in seeds:
        base = rng.normal(0, 0.1)
        for arm in ARMS:
            rl = arm in ASKED.families["RL"]
            new, old = (0.5 if rl else 1.0) + rng.normal(0, 0.3), abs(rng.normal(0, 0.5))
            kept = 0.9 + base + effect * rl + per_nat * new + rng.normal(0, noise)
            accuracy = 0.95 - 0.3 * old + rng.normal(0, noise)
            records["drift", arm, seed] = {"new": {"kl": new}, "old": {"kl": old}}
            records["evaluate", arm, seed] = {"circuit": {"retention": kept}, "old_accuracy": accuracy}
            records["match", arm, seed] = {"reached": True}
    return Cells(seeds, ARMS, records, ())


def frame(n: int) -> pd.DataFrame:
    rng = np.random.default_rng(n)
    part = pd.DataFrame({"seed": np.repeat([f"s{k}" for k in range(n)], 4), "method": np.tile([0.0, 0, 1, 1], n)})
    part["kl"] = rng.normal(1, 0.3, 4 * n)
    part["y"] = np.repeat(rng.normal(0, 1, n), 4) + 0.2 * part["method"] - 0.5 * part["kl"] + rng.normal(0, 0.1, 4 * n)
    return part


@pytest.mark.parametrize("predictors", [["method"], ["method", "kl"], ["kl"]])
def test_against_dummy_variables(predictors: list[str]) -> None:
    part = frame(5).iloc[:-1]  # seeds of unequal size, too
    found = fit(part, "y", predictors, predictors[0], 0.95)
    result = ols(f"y ~ {' + '.join(predictors)} + C(seed)", part).fit()
    expected = [result.params[predictors[0]], *result.conf_int(0.05).loc[predictors[0]], result.pvalues[predictors[0]]]
    error = np.abs(np.array([found["effect"], *found["ci"], found["p"]]) - expected).max()
    print("max error", error)
    assert error <= 1e-12 and found["why_not"] is None


def test_r2_of_left_out_seeds_by_hand() -> None:
    """Fit all other seeds with dummies, predict the differences between the rows of the seed left out."""
    part = frame(4)
    wrong = total = 0.0
    for seed in sorted(set(part["seed"])):
        inside, rest = part[part["seed"] == seed], part[part["seed"] != seed]
        params = ols("y ~ method + kl + C(seed)", rest).fit().params
        guess = params["method"] * inside["method"] + params["kl"] * inside["kl"]
        y = np.asarray(inside["y"], dtype=float)
        errors = y - np.asarray(guess, dtype=float)
        wrong += len(y) * float(np.var(errors))
        total += len(y) * float(np.var(y))
    found = fit(part, "y", ["method", "kl"], "method", 0.95)["r2"]
    print("R2", found, "error", abs(found - (1 - wrong / total)))
    assert found == pytest.approx(1 - wrong / total, abs=1e-12) and 0.5 < found < 1


def test_prediction_by_hand() -> None:
    """Correlations over the arms of each seed."""
    cells = experiment(4)
    found = adjust(cells, ASKED, {})["prediction"]
    expected = {}
    for seed in cells.seeds:
        loss, *distances = (
            [cells.value(name, arm, seed) or 0.0 for arm in ARMS] for name in (ASKED.forgetting, *ASKED.predictors[:2])
        )
        first, second = (correlation(distance, loss) for distance in distances)
        expected[seed] = second - first  # the loss is minus the accuracy
    assert found["values"] == pytest.approx(expected, abs=1e-12)
    assert found["difference"] == pytest.approx(np.mean(list(expected.values()))) and found["p"] == 2 / 2**4
    assert found["ci"] == pytest.approx(t_interval(list(expected.values()), 0.95))
    assert found["correlations"][0] > 0.95 > found["correlations"][1]


def test_two_arms_have_no_correlation() -> None:
    cells = experiment(4)
    found = adjust(Cells(cells.seeds, ("grpo", "sft_gold"), cells.records, ()), ASKED, {})["prediction"]
    assert found["n"] == 0 and found["p"] is None and found["difference"] is None


def test_noise_predicts_nothing_that_was_not_fitted() -> None:
    """In sample R2 would be positive."""
    rng = np.random.default_rng(0)
    seeds = np.repeat(np.arange(4), 2)
    found = []
    for _ in range(50):
        x, y = (np.repeat(rng.normal(size=4), 2) * np.tile([1.0, -1.0], 4) for _ in range(2))
        found.append(left_out_r2(x[:, None], y, seeds))
    assert float(np.median(found)) < 0


def test_the_raw_effect_is_the_paired_contrast() -> None:
    cells = experiment(6)
    contrast = adjust(cells, ASKED, {})["effects"][1]
    differences = [
        (cells.value(ASKED.outcome, "grpo", seed) or 0.0) - (cells.value(ASKED.outcome, "sft_gold", seed) or 0.0)
        for seed in cells.seeds
    ]
    assert contrast["name"] == "grpo − sft_gold" and contrast["n"] == 6
    assert contrast["raw_effect"] == pytest.approx(np.mean(differences), abs=1e-12)
    assert contrast["raw_ci"] == pytest.approx(t_interval(differences, 0.95), abs=1e-12)


def test_what_was_planted_is_found() -> None:
    found = adjust(experiment(20), ASKED, {"3": None})
    family = found["effects"][0]
    assert family["n"] == 19 and found["families"] == {"RL": ["grpo", "reinforce"], "SFT": ["sft_gold", "self_sft"]}
    assert family["adjusted_ci"][0] <= 0.03 <= family["adjusted_ci"][1] and family["raw_effect"] > 0.06
    r2 = {entry["measure"]: entry["r2"] for entry in found["predictors"]}
    assert r2["drift.old.kl"] > 0.9 and r2["drift.new.kl"] < 0.1 and r2["evaluate.circuit.retention"] < 0.1
    assert found["predictors"][0]["effect"] == pytest.approx(0.3, abs=0.02)
    assert family["adjusted_p"] < 0.05
    assert (
        found["prediction"]["n"] == 19 and found["prediction"]["p"] < 0.001 and "3" not in found["prediction"]["values"]
    )
    first, _, last = adjustment_sentences(found, NAMES, 0.95)
    assert "leaves zero out" in first and "best predicted by KL on old-task prompts" in last


def test_one_bad_arm_is_not_taken_for_its_family() -> None:
    """Without an effect of the method, one arm of SFT that destroys the circuit makes the family's effect."""
    cells = experiment(20, effect=0.0)
    for seed in cells.seeds:
        cells.record("evaluate", "sft_gold", seed)["circuit"]["retention"] -= 0.2
    found = adjust(cells, ASKED, {})
    assert found["effects"][0]["adjusted_effect"] == pytest.approx(0.1, abs=0.02)
    gold, own = found["by_reference"]
    assert gold["references"] == ["sft_gold"] and gold["arms"] == list(ASKED.families["RL"])
    assert gold["adjusted_effect"] == pytest.approx(0.2, abs=0.02) and gold["adjusted_ci"][0] > 0.15
    assert own["adjusted_ci"][0] <= 0 <= own["adjusted_ci"][1]
    values = [f"{e['adjusted_effect']:+.3f}".replace("-", "−") for e in (gold, own)]
    assert adjustment_sentences(found, NAMES, 0.95)[1] == (
        f"RL against each arm of SFT alone, adjusted: {values[0]} [sft_gold], {values[1]} [self_sft]; the interval "
        "leaves zero out for [sft_gold]."
    )


def test_one_arm_in_the_family_is_not_compared_twice() -> None:
    cells = experiment(6)
    found = adjust(Cells(cells.seeds, ("grpo", "sft_gold"), cells.records, ()), ASKED, {})
    assert found["by_reference"] == [] and len(adjustment_sentences(found, NAMES, 0.95)) == 2


@pytest.mark.parametrize(
    ("cells", "why"),
    [
        (experiment(0), "0 seeds, at least 2 are needed"),
        (experiment(1), "1 seed, at least 2 are needed"),
        (experiment(2), "2 seeds leave no degree of freedom"),
        (experiment(4, effect=0.0, per_nat=0.0, noise=0.0), "the outcome has no spread inside the seeds"),
    ],
    ids=["none", "one", "two", "no spread"],
)
def test_what_cannot_be_estimated_says_why(cells: Cells, why: str) -> None:
    found = adjust(cells, ASKED, {})
    assert found["effects"][0]["adjusted_ci"] is None and found["effects"][0]["adjusted_why_not"] == why
    assert f"Not estimable: {why}." in adjustment_sentences(found, NAMES, 0.95)[0]


def test_arms_that_are_not_there() -> None:
    cells = experiment(4)
    alone = Cells(cells.seeds, ("grpo",), cells.records, ())
    found = adjust(alone, ASKED, {})
    assert found["effects"][0]["n"] == 0 and found["families"]["SFT"] == []
    assert all("spread" in entry["why_not"] for entry in found["predictors"])  # one arm a seed
    assert "Not estimable: the outcome has no spread" in adjustment_sentences(found, NAMES, 0.95)[1]
