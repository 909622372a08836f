"""What the report says of the four scores, and of what was lost in the circuit and what around it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stages import contrast, report
from stages.measures.scores import ENDINGS, score_of, shares
from stages.pipeline.files import read_json
from stages.statistics import by_ablation, by_score
from stages.tasks.old.boxes import Boxes
from stages.tasks.old.ioi import Ioi
from tests.synthetic_records import Experiment
from tests.test_report import _derived, _unknown_numbers  # pyright: ignore[reportPrivateUsage]

EXPERIMENT = Experiment(
    seeds=range(4),
    arms=("sft_gold", "grpo", "noise"),
    unreached=frozenset({("grpo", 3)}),
    hidden=frozenset({2}),
    contrasts=(("grpo", "sft_gold"),),
)
COUNTED = {"base": (0, 1, 3), "sft_gold": (0, 1, 3), "grpo": (0, 1), "noise": (0, 1, 3)}
# arm -> what is lost in the circuit and around it, of what it does in the base with the same outputs around it
LOST = {"base": (0.0, 0.0), "sft_gold": (0.3, 0.1), "grpo": (0.05, 0.25), "noise": (0.04, -0.02)}
PRECISION = {"reference": "float32", "examples": 16, "heads": 48, "largest_difference": 0.0042, "least": 0.01}
PRECISION |= {"shared_of_10_strongest": 0.9, "heads_of_least": 9, "spearman_of_least": None}
KINDS = {"own_means": (1.0, 1), "base_means": (1.0, 0), "resampled": (0.5, 1), "base_resampled": (0.5, 0)}


def _write(
    root: Path, patch: pytest.MonkeyPatch, beyond: float = 0.02, rounded: bool = False, **primary: Any
) -> dict[str, Any]:
    """Records with four scores and every kind of outputs around the circuit, and their report; its summary."""
    EXPERIMENT.write(root)
    for path in (root / "reports/cells/evaluate").glob("*/*.json"):
        record = read_json(path)
        inside, around = LOST[path.parent.name]
        record |= {"old_candidate_accuracy": 0.98, "old_p_correct": 0.9, "old_chance": 0.14}
        full = {score: record[f"old_{score}"] for score in ENDINGS}
        found: dict[str, Any] | None = None
        if record["circuit"]:
            found = {}
            for kind, (strength, own) in KINDS.items():
                left = strength * (1 - inside - around * own) * (1 + 0.01 * int(path.stem))
                scores = {"accuracy": 0.9 * left - beyond, "candidate_accuracy": 0.9 * left}
                scores |= {"logit_difference": 6 * left, "p_correct": 0.8 * left}
                found[kind] = {"size": 18} | scores | shares("faithfulness", scores, full)
                found[kind] |= {"from_donor": 0.3 + 0.1 * own} if strength < 1 else {}
            record["circuit"] = dict(found["own_means"])
            judged = score_of(primary["primary_measure"])
            if judged != "accuracy":  # records of earlier runs do not say it
                record["inspection"]["minimality"] |= {"score": judged, f"core_share{ENDINGS[judged]}": 0.75}
        record["circuit_by_ablation"] = found
        path.write_text(json.dumps(record))
    for path in (root / "reports/cells/discover").glob("*/*/record.json") if rounded else ():
        agreement = PRECISION | {"spearman": 0.6 + 0.1 * int(path.parent.name)}
        path.write_text(json.dumps(read_json(path) | {"precision": agreement}))
    values = EXPERIMENT.params()
    vars(values["contrast"]).update({"base_faithfulness": 0.8} | primary)
    patch.chdir(root)
    for stage in (contrast, report):
        cell = EXPERIMENT.cell(stage.__name__.rpartition(".")[2])
        cell.values.update(values)  # pyright: ignore[reportAttributeAccessIssue]
        stage.main(cell)
    return read_json(root / "reports/summary.json")


def test_what_is_lost_in_the_circuit_and_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    summary = _write(tmp_path, monkeypatch, rounded=True, primary_measure="evaluate.circuit.retention_ld")
    rows = {row["model"]: row for row in summary["table_ablations"]}
    assert {model: row["seeds"] for model, row in rows.items()} == {m: len(seeds) for m, seeds in COUNTED.items()}
    for arm, (inside, around) in list(LOST.items())[1:]:
        for kind in by_ablation.AROUND:  # the seeds' factor and the strength of a kind are in the base, too
            lost = rows[arm]["lost"][kind]
            assert lost["n"] == len(COUNTED[arm])
            found = [lost[part]["mean"] for part in ("kept", "in_circuit", "around")]
            assert found == pytest.approx([1 - inside - around, inside, around], abs=1e-12)
            assert lost["around"]["ci"] == pytest.approx([around] * 2, abs=1e-9), "the same at every seed"
    factor = np.mean([1 + 0.01 * seed for seed in COUNTED["base"]])
    expected = {"own_means": 6 / 6.24, "base_means": 6 / 6.24, "resampled": 3 / 6.24, "base_resampled": 3 / 6.24}
    assert rows["base"]["faithfulness"] == pytest.approx({k: factor * value for k, value in expected.items()})
    assert rows["base"]["from_donor"] == pytest.approx({"resampled": 0.4, "base_resampled": 0.3})
    assert rows["base"]["lost"] is None
    text = (tmp_path / "reports/report.md").read_text()
    assert (
        "With means around the circuit, on average more was lost in it than around it in SFT (gold) (+0.300 in it, "
        "+0.100 around it); more was lost around it than in it in GRPO (+0.050 in it, +0.250 around it); less than "
        "0.05 was lost in Random direction (+0.040 in it, −0.020 around it) (shares of what it did in the base)."
        in text
    )
    assert (
        "16 of them in float32, too, on 16 prompts: the heads that send to the logits rank alike by 0.750 (Spearman, "
        "mean; lowest 0.600), those with a score of 0.01 or more in float32 by – (–); of the ten strongest 0.90 are "
        "the same (0.90), and no score differs by more than 0.0042."
    ) in text
    section = text[text.index("## Which score") :]
    section = section[: section.index("\n## ")]
    print(section)
    assert not re.search(r"\b(nan|None)\b", section)
    assert _unknown_numbers(section, _derived(summary)) == []


@pytest.mark.parametrize(("ending", "beyond", "said"), [("", 0.02, False), ("", 0.3, True), ("_ld", 0.3, False)])
def test_which_score_is_primary_and_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str, beyond: float, said: bool
) -> None:
    """That accuracy misses what circuits do is said where it is primary and other words are likelier."""
    measure = f"evaluate.circuit.retention{ending}"
    least = {} if beyond < 0.1 else NO_LEAST
    summary = _write(tmp_path, monkeypatch, beyond, primary_measure=measure, **least)
    rows = {row["model"]: row for row in summary["table_scores"]}
    records = [read_json(tmp_path / f"reports/cells/evaluate/grpo/{seed}.json") for seed in COUNTED["grpo"]]
    for score in ENDINGS:
        assert rows["grpo"]["scores"][score]["whole"] == pytest.approx(np.mean([r[f"old_{score}"] for r in records]))
        assert rows["grpo"]["scores"][score]["circuit"] == pytest.approx(
            np.mean([r["circuit"][score] for r in records])
        )
    assert rows["grpo"]["scores"]["p_correct"]["kept"] == pytest.approx(0.7)
    text = (tmp_path / "reports/report.md").read_text()
    assert "bfloat16" not in text
    name = {"": "accuracy: the likeliest token", "_ld": "logit difference: it compares"}[ending]
    assert f"The primary score is the {name}" in text and f"For {beyond:.3f} of the prompts" in text
    assert ("accuracy misses what these circuits do" in text) is said
    judged, core, gap = {"": ("accuracy", 0.99, None), "_ld": ("logit difference", 0.75, 0.1)}[ending]
    assert f"with the share of the circuit's {judged} that the core keeps" in text
    [base, *_] = summary["table_circuits"]
    assert base["core_share"] == pytest.approx(core) and (gap is None or base["worst_gap"] == pytest.approx(gap))


NO_LEAST: dict[str, Any] = {"base_faithfulness": 0.0}


def test_a_primary_measure_that_is_of_no_score() -> None:
    none = dict.fromkeys(("whole", "circuit", "kept", "faithfulness", "random"))
    table = [{"model": "base", "seeds": 0, "scores": dict.fromkeys(ENDINGS, none)}]
    assert by_score.findings(table, "drift.old.kl", {}) == [
        "The primary measure (KL on old-task prompts) is none of these scores; bases count by accuracy."
    ]
    assert "likeliest token" in by_score.findings(table, "evaluate.old_accuracy", {})[0]
    for task, candidates in ((Boxes, "the objects of the other boxes."), (Ioi, "the name that is said twice.")):
        [said] = by_score.findings(table, "evaluate.circuit.retention_ld", task.described())
        assert said.startswith("The primary score is the logit difference: it compares the answer with the other")
        assert said.endswith(f" In {task.title} the other candidates are {candidates}")


def test_records_of_earlier_runs_have_no_such_section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    EXPERIMENT.write(tmp_path)
    monkeypatch.chdir(tmp_path)
    contrast.main(EXPERIMENT.cell("contrast"))
    report.main(EXPERIMENT.cell("report"))
    summary = read_json(tmp_path / "reports/summary.json")
    for key in ("table_scores", "table_ablations", "score_findings", "ablation_findings"):
        assert summary[key] == []
    assert "Which score, and what is around" not in (tmp_path / "reports/report.md").read_text()
