"""The report of made-up records: every number is in summary.json, a rerun changes nothing."""

import json
import re
import shutil
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from stages import contrast, report
from stages.figures import style
from stages.figures.document import document, to_markdown
from stages.pipeline.files import read_json, write_json
from stages.pipeline.stage import Invalid
from stages.statistics.cells import read_cells
from stages.statistics.enhancement import findings
from stages.statistics.provenance import provenance
from stages.statistics.summary import summarise
from stages.statistics.wording import sample_of
from tests.synthetic_records import SHORTCUTS, Experiment

SMALL = Experiment(seeds=(0,), arms=("sft_gold", "grpo"), contrasts=(("grpo", "sft_gold"),))
LARGE = Experiment(
    seeds=range(4),
    arms=("sft_gold", "grpo", "sft_replay", "noise"),
    unreached=frozenset({("grpo", 3)}),
    hidden=frozenset({2}),
    contrasts=(("grpo", "sft_gold"),),
)
WRITTEN = ("report.html", "report.md", "summary.json", "statistics.json", "cells.csv")


def _run(root: Path, experiment: Experiment) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        contrast.main(experiment.cell("contrast"))
        report.main(experiment.cell("report"))


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """reports/ of an experiment with an unreached level and a base without an identifiable circuit."""
    root = tmp_path_factory.mktemp("report")
    LARGE.write(root)
    _run(root, LARGE)
    return root / "reports"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same for one seed and two arms, run twice."""
    root = tmp_path_factory.mktemp("small")
    SMALL.write(root)
    _run(root, SMALL)
    (root / "first").mkdir()
    for path in _outputs(root / "reports"):
        (root / "first" / path.name).write_bytes(path.read_bytes())
    _run(root, SMALL)
    return root


def _outputs(reports: Path) -> list[Path]:
    return [*(reports / name for name in WRITTEN), *sorted((reports / "figures").iterdir())]


def _leaves(value: Any) -> Iterator[Any]:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    if parts is None:
        yield value
    else:
        for part in parts:
            yield from _leaves(part)


def _unknown_numbers(text: str, summary: dict[str, Any]) -> list[str]:
    """Numbers of a text that are no number of the summary, at the printed digits, nor in a text of it."""
    leaves = [leaf for leaf in _leaves(summary) if leaf is not None and not isinstance(leaf, bool)]
    numbers = np.array([float(leaf) for leaf in leaves if not isinstance(leaf, str)])
    words = " ".join(leaf for leaf in leaves if isinstance(leaf, str))
    texts = sorted((leaf for leaf in leaves if isinstance(leaf, str) and len(leaf) > 20), key=len, reverse=True)
    for entry in texts:
        text = text.replace(entry, "")
    unknown = []
    for token in re.findall(r"(?<![\w.])[−+]?\d+(?:\.\d+)*(?:e[−-]?\d+)?(?!\w)", text):
        if token.count(".") > 1:  # a version
            unknown += [] if token in words else [token]
            continue
        printed = token.replace("−", "-")
        digits = len(printed.partition(".")[2])
        close = np.abs(numbers - float(printed)) <= 0.5 * 10.0**-digits * (1 + 1e-9)
        if not close.any() and not re.search(rf"(?<![\d.]){re.escape(token)}(?![\d.])", words):
            unknown.append(token)
    return unknown


def _derived(summary: dict[str, Any]) -> dict[str, Any]:
    """Numbers that a reader can count off in the summary: percent, lengths of lists."""
    plan = summary["plan"][0]
    excluded = [len(entry["excluded"]) for entry in summary["table_contrasts"]]
    return summary | {
        "counted": [100 * plan["confidence"], 100 * plan["power"], len(summary["table_family"]), *excluded, 1]
    }


def test_every_number_is_in_the_summary(written: Path) -> None:
    summary = read_json(written / "summary.json")
    text = re.sub(r"\]\(figures/[^)]*\)|\b[HC]\d+\b", "", (written / "report.md").read_text())
    assert len(re.findall(r"\d\.\d", text)) > 100
    assert _unknown_numbers(text, _derived(summary)) == []


def test_a_foreign_number_is_noticed(written: Path) -> None:
    """The test above can fail."""
    summary = _derived(read_json(written / "summary.json"))
    assert _unknown_numbers("GRPO kept 0.98765 of it", summary) == ["0.98765"]


def test_main_numbers_by_hand(written: Path) -> None:
    summary = read_json(written / "summary.json")
    alone = {
        model: [read_json(written / f"cells/evaluate/{model}/{seed}.json")["circuit"]["accuracy"] for seed in (0, 1)]
        for model in ("base", "grpo")
    }
    kept = np.array(alone["grpo"]) / np.array(alone["base"])
    assert summary["arms"]["grpo"]["evaluate_circuit_retention"] == pytest.approx(np.mean(kept))
    assert summary["arms"]["grpo"]["evaluate_circuit_retention_sd"] == pytest.approx(np.std(kept, ddof=1))
    assert summary["contrasts"]["H1"]["n"] == 2
    assert summary["shortcut"] == max(SHORTCUTS.values())


def test_circuit_tests_by_hand(written: Path) -> None:
    """The table leaves out seeds that the arm did not reach, and seeds without a circuit add nothing."""
    rows = {row["model"]: row for row in read_json(written / "summary.json")["table_circuits"]}
    records = [read_json(written / f"cells/evaluate/grpo/{seed}.json")["inspection"] for seed in (0, 1)]
    assert rows["grpo"]["seeds"] == 3 and rows["base"]["seeds"] == 4
    assert rows["grpo"]["cpr"] == pytest.approx(np.mean([record["size_curve"]["cpr"] for record in records]))
    random = [record["completeness"][f"random_{k}"]["gap"] for record in records for k in (1, 2)]
    assert rows["grpo"]["random_gap"] == pytest.approx(np.mean(random))
    whole = ("nothing", "random_1", "random_2", "worst_found")
    groups = [e["gap"] for r in records for name, e in r["completeness"].items() if name not in whole]
    assert rows["grpo"]["group_gap"] == pytest.approx(np.mean(groups))


def test_the_same_task_asks_whether_the_mechanism_is_enhanced(tmp_path: Path, written: Path) -> None:
    """A section of its own, and nothing of it where the new task is another one."""
    experiment = Experiment(arms=("sft_gold", "grpo"), contrasts=(("grpo", "sft_gold"),), new_task="contains")
    experiment.write(tmp_path)
    _run(tmp_path, experiment)
    summary = read_json(tmp_path / "reports/summary.json")
    text = (tmp_path / "reports/report.md").read_text()
    rows = {row["model"]: row for row in summary["table_enhancement"]}
    records = [read_json(tmp_path / f"reports/cells/evaluate/grpo/{seed}.json") for seed in (0, 1, 2)]
    assert rows["grpo"]["circuit_accuracy"] == pytest.approx(np.mean([r["circuit"]["accuracy"] for r in records]))
    assert rows["Goat-7B"]["faithfulness"] == pytest.approx(0.73 / 0.82)
    assert {row["arm"] for row in summary["table_enhancing_heads"]} == {"sft_gold", "grpo"}
    assert "## Is the existing mechanism enhanced?" in text and "| Vicuna-7B | " in text
    assert _unknown_numbers(re.sub(r"\]\(figures/[^)]*\)|\b[HC]\d+\b|-7B", "", text), _derived(summary)) == []
    assert "enhanced?" not in (written / "report.md").read_text()
    # what the records plant: arms that are worse than the base, which is not half-trained
    assert summary["enhancement_findings"] == [
        f"No arm answers more than the base ({rows['base']['model_accuracy']:.2f})."
    ]
    assert text.count(summary["enhancement_findings"][0]) == 2 and summary["checks"]["base_old_accuracy"] is False
    assert "Every base is half-trained" in text


def test_what_enhancement_says_is_what_its_tables_say() -> None:
    def model(name: str, whole: float, circuit: float) -> dict[str, Any]:
        return {"model": name, "source": None, "model_accuracy": whole, "circuit_accuracy": circuit}

    def heads(arm: str, group: str, transplanted: float) -> dict[str, Any]:
        return {"arm": arm, "group": group, "transplanted": transplanted, "random": 0.7}

    models = [model("base", 0.66, 0.65), model("grpo", 0.95, 0.9), model("noise", 0.7, 0.7)]
    models.append(model("Llama-7B", 0.66, 0.66) | {"source": "published"})
    tables = [heads(arm, group, 0.8) for arm in ("grpo", "noise") for group in ("circuit", "q_last")]
    names = {"base": "Base", "grpo": "GRPO", "noise": "Random direction"}
    assert findings(models, tables, names) == [
        "Alone, everything else mean-ablated, the base's circuit answers (in brackets the whole model) 0.65 in the "
        "base (0.66) and 0.90 in GRPO (0.95).",
        "The tuned outputs of the circuit's heads, put into the base, lift it from 0.66 to 0.80 with those of GRPO "
        "(random heads 0.70).",
    ]


def test_budgets_by_hand(written: Path) -> None:
    """The random direction takes no step; a seed that did not reach the level does not count for the way to it."""
    curves = [pd.read_csv(file) for file in (written / "cells/finetune/grpo").rglob("*.csv")]
    steps = [read_json(written / f"cells/match/grpo/{seed}.json")["step"] for seed in range(3)]
    rows = {row["arm"]: row for row in read_json(written / "summary.json")["table_budgets"]}
    assert set(rows) == {"sft_gold", "grpo", "sft_replay"}
    assert rows["grpo"]["answers"] == max(curve["completions"].max() for curve in curves)
    assert rows["grpo"]["tokens"] == rows["grpo"]["answers"] * 55
    assert rows["grpo"]["steps_to_level"] == pytest.approx(np.mean(steps))


def test_inputs_by_hand(written: Path) -> None:
    """Means over the seeds that count: not that of the base without a circuit, nor the one that GRPO did not reach."""
    rows = {row["arm"]: row for row in read_json(written / "summary.json")["table_inputs"]}
    records = [read_json(written / f"cells/cmap/grpo/{seed}.json") for seed in (0, 1)]
    given = {name: [r["inputs"]["tuned_to_base"][name]["circuit"]["accuracy"] for r in records] for name in "qkv"}
    given["outputs"] = [record["tuned_to_base"]["circuit"]["accuracy"] for record in records]
    given |= {name: [record[f"{name}_accuracy"] for record in records] for name in ("base", "tuned")}
    assert list(rows) == ["sft_gold", "grpo", "sft_replay", "noise"] and rows["grpo"]["seeds"] == 2
    for name, values in given.items():
        assert rows["grpo"][name]["mean"] == pytest.approx(np.mean(values))
        low, high = rows["grpo"][name]["ci"]
        assert low <= np.mean(values) <= high
    text = (written / "report.md").read_text()
    assert "| Arm | Seeds | Base | with q | with k | with v | with outputs | Tuned model |" in text
    assert f"| GRPO | 2 | {np.mean(given['base']):.3f} | {np.mean(given['q']):.3f} (" in text
    assert "not transplanted" not in text


@pytest.mark.parametrize("left", [None, {}, {"tuned_to_base": {"v": {"circuit": {"accuracy": 0.5}}}}])
def test_records_without_inputs_still_make_a_report(tmp_path: Path, left: dict[str, Any] | None) -> None:
    """Those of older runs have no such key, and an experiment may ask for none, or for some."""
    SMALL.write(tmp_path)
    for path in (tmp_path / "reports/cells/cmap").glob("*/*.json"):
        record = read_json(path)
        del record["inputs"]
        path.write_text(json.dumps(record if left is None else record | {"inputs": left}))
    _run(tmp_path, SMALL)
    table, text = (read_json(tmp_path / "reports/summary.json")["table_inputs"], _text(tmp_path))
    assert bool(table) == ("| Arm | Seeds | Base | with v | with outputs | Tuned model |" in text) == bool(left)
    assert ("q, k and v were not transplanted" in text) == (not left)
    assert "Cross-model activation patching" in text


def _text(root: Path) -> str:
    return (root / "reports/report.md").read_text()


def test_tables_name_the_arms_in_the_order_of_the_params(written: Path) -> None:
    text = (written / "report.md").read_text()
    for title, columns in (("Hypervolume", 4), ("Cosine", 13)):
        lines = text[text.index(f"| {title} |") :].splitlines()[2:6]
        assert all(line.count("|") == columns + 1 for line in lines)
        assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
            "SFT (gold)",
            "GRPO",
            "SFT + replay",
            "Random direction",
        ]


def test_html_is_one_file(written: Path) -> None:
    text = (written / "report.html").read_text()
    for word in ("http:", "https:", "<script", "<link", "@import", "url("):
        assert word not in text
    assert text.count('src="data:image/png;base64,') == len(list((written / "figures").iterdir()))

    class Balanced(HTMLParser):
        def __init__(self) -> None:
            super().__init__()
            self.stack: list[str] = []

        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            if tag not in ("meta", "img"):
                self.stack.append(tag)

        def handle_endtag(self, tag: str) -> None:
            assert self.stack.pop() == tag

    parser = Balanced()
    parser.feed(text)
    assert parser.stack == []


def test_images_exist_and_show_something(written: Path) -> None:
    names = re.findall(r"\]\((figures/[^)]*)\)", (written / "report.md").read_text())
    assert sorted(names) == sorted(f"figures/{path.name}" for path in (written / "figures").iterdir())
    for name in names:
        pixels = np.asarray(Image.open(written / name).convert("L"))
        assert pixels.shape[1] > 400 and pixels.std() > 3, name


def test_what_is_left_out_is_said(written: Path) -> None:
    text = (written / "report.md").read_text()
    assert "seed 2: its base has no identifiable circuit" in text
    assert "seed 3: level not reached by GRPO" in text
    assert "Matching level not reached: GRPO at seed 3" in text
    assert "not identifiable" in text and "Base at seed 2" in text
    assert "2 pairs left out" in text.split("## ")[0]  # beside the answer


def test_arms_that_were_taught_the_same_answers_are_named(tmp_path: Path) -> None:
    arms = ("sft_gold", "self_sft", "sft_far", "grpo")
    for answers, said in ((1, True), (2, False)):
        root = tmp_path / str(answers)
        experiment = Experiment(seeds=(0,), arms=arms, contrasts=(("grpo", "sft_gold"),), valid_answers=answers)
        experiment.write(root)
        _run(root, experiment)
        sentence = "one right answer, so SFT (own samples) and SFT (far) learned from the same answers as SFT (gold)."
        assert (sentence in _text(root)) == said and ("one right answer" in _text(root)) == said


def test_bases_of_one_pretrained_model_are_called_that(tmp_path: Path, written: Path) -> None:
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "dr_grpo"), contrasts=(("dr_grpo", "sft_gold"),))
    experiment.write(tmp_path)
    for seed in experiment.seeds:
        file = tmp_path / f"reports/cells/pretrain/{seed}/record.json"
        write_json(file, read_json(file) | {"source": "package", "taught": {"steps": 20}})
    _run(tmp_path, experiment)
    said = {sample_of("curriculum", False), sample_of("package", True), sample_of("package", False)}
    for folder, sample in (
        (tmp_path / "reports", sample_of("package", True)),
        (written, sample_of("curriculum", False)),
    ):
        lead = (folder / "report.md").read_text().split("## ")[0]
        assert [sentence for sentence in said if sentence in lead] == [sample]


def _held(reports: Path) -> dict[str, bool | None]:
    return read_json(reports / "summary.json")["checks"]


def test_checks(written: Path) -> None:
    held = _held(written)
    assert list(held) == [
        "base_circuit_faithfulness",
        "base_new_pass_at_8",
        "base_old_accuracy",
        "groups_carry",
        "noise_over_sft_gold",
        "random_circuits",
        "reached_grpo",
        "reached_noise",
        "reached_sft_gold",
        "reached_sft_replay",
        "sft_replay_over_sft_gold",
    ]
    assert {name for name, holds in held.items() if not holds} == {"base_circuit_faithfulness", "reached_grpo"}
    rows = {row["name"]: row["found"] for row in read_json(written / "summary.json")["table_checks"]}
    assert rows["base_circuit_faithfulness"] == "3 of 4 bases; seed 2: –"
    assert rows["random_circuits"] == "3 of 3 bases"
    assert rows["reached_grpo"] == "3 of 4 seeds; not seed 3"
    text = (written / "report.md").read_text()
    assert "| GRPO reaches the matching level at every seed | fail | 3 of 4 seeds; not seed 3 |" in text


@pytest.mark.parametrize("learning", [(), (1,)])
def test_a_reward_that_says_nothing_must_not_teach(tmp_path: Path, learning: tuple[int, ...]) -> None:
    experiment = Experiment(
        seeds=(0, 1),
        arms=("sft_gold", "random_reward"),
        learning=frozenset(("random_reward", seed) for seed in learning),
        contrasts=(("random_reward", "sft_gold"),),
    )
    experiment.write(tmp_path)
    _run(tmp_path, experiment)
    held = _held(tmp_path / "reports")
    assert held["not_learned_random_reward"] is not bool(learning) and held["reached_random_reward"]
    assert "random_reward_over_sft_gold" in held  # the sham beside what it is like


def test_arms_that_nothing_harms_are_not_just_called_equal(tmp_path: Path, written: Path) -> None:
    """Where every arm keeps all of the circuit, equivalence is exact and says nothing: the controls fail."""
    experiment = Experiment(
        seeds=(0, 1, 2), arms=("sft_gold", "grpo", "sft_replay", "noise"), contrasts=(("grpo", "sft_gold"),)
    )
    experiment.write(tmp_path)
    for path in (tmp_path / "reports/cells/evaluate").glob("*/*.json"):
        record = read_json(path)
        record["circuit"]["accuracy"] = 0.93
        path.write_text(json.dumps(record))
    _run(tmp_path, experiment)
    summary = read_json(tmp_path / "reports/summary.json")
    assert summary["headline"]["verdict"] == "equivalent"
    assert "could hardly have shown a difference" in summary["headline"]["sentence"]
    assert (
        "positive control: SFT + replay keeps more than SFT (gold), difference +0.000"
        in (summary["headline"]["sentence"])
    )
    assert "could hardly have" not in read_json(written / "summary.json")["headline"]["sentence"]


def test_checks_can_fail(tmp_path: Path) -> None:
    """A base that lacks the old task or seldom guesses the new one, a random circuit that works, a group that carries
    nothing."""
    SMALL.write(tmp_path)
    path = tmp_path / "reports/cells/pretrain/0/record.json"
    record = read_json(path)
    record["tasks"][SMALL.new_task]["pass_at_8"] = 0.79
    path.write_text(json.dumps(record))
    path = tmp_path / "reports/cells/evaluate/base/0.json"
    record = read_json(path)
    record["old_accuracy"] = 0.9
    record["random"]["faithfulness"][3] = 0.31
    path.write_text(json.dumps(record))
    path = tmp_path / "reports/cells/dcm/base/0.json"
    record = read_json(path)
    for scores in record["groups"]["q_last"].values():
        scores["accuracy"] = scores["floor"]
    path.write_text(json.dumps(record))
    _run(tmp_path, SMALL)
    held = _held(tmp_path / "reports")
    assert {name for name, holds in held.items() if not holds} == {
        "base_old_accuracy",
        "base_new_pass_at_8",
        "random_circuits",
        "groups_carry",
    }
    assert "| fail | 5 of 6 groups; seed 0: q_last |" in (tmp_path / "reports/report.md").read_text()


@pytest.mark.parametrize("weak", [{2}, {0, 2}, {0, 1, 2}], ids=["two left", "one left", "none left"])
def test_weak_bases_are_left_out_and_named(tmp_path: Path, weak: set[int]) -> None:
    experiment = Experiment(
        seeds=range(3), arms=("sft_gold", "grpo"), contrasts=(("grpo", "sft_gold"),), weak=frozenset(weak)
    )
    experiment.write(tmp_path)
    _run(tmp_path, experiment)
    summary = read_json(tmp_path / "reports/summary.json")
    assert [entry["seed"] for entry in summary["bases_left_out"]] == [str(seed) for seed in sorted(weak)]
    assert summary["base"]["left_out"] == len(weak)
    assert (
        summary["headline"]["verdict"] in {1: ("undecided", "suggestive"), 2: ("one pair",), 3: ("no pair",)}[len(weak)]
    )
    assert summary["checks"]["base_circuit_faithfulness"] is False
    for name in ("report.md", "report.html"):
        text = (tmp_path / "reports" / name).read_text()
        for seed in weak:
            assert f"Seed {seed}: its base circuit reaches 0.484 of the model; it is left out" in text
        assert not re.search(r"\b(nan|None)\b", re.sub(r'src="[^"]*"', "", text))
    text = re.sub(r"\]\(figures/[^)]*\)|\b[HC]\d+\b", "", (tmp_path / "reports/report.md").read_text())
    assert _unknown_numbers(text, _derived(summary)) == []


def test_no_text_of_a_figure_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With all arms in the legends, and with the entries that are there only when something was left out."""
    experiment = Experiment(unreached=frozenset({("grpo", 1)}), weak=frozenset({2}))
    experiment.write(tmp_path)
    draw, beyond = report.png, []

    def checked(figure: Figure, dpi: int) -> bytes:
        figure.set_dpi(dpi)  # letters are a little wider at few pixels
        figure.draw_without_rendering()
        drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
        beyond.append(max(-drawn.x0, -drawn.y0, drawn.x1 - width, drawn.y1 - height))
        return draw(figure, dpi)

    monkeypatch.setattr(report, "png", checked)
    _run(tmp_path, experiment)
    print("inches beyond the edge, largest of each figure", beyond)
    assert len(beyond) == 15 and max(beyond) <= 0.01


def test_a_rerun_gives_the_same_bytes(small: Path) -> None:
    for path in _outputs(small / "reports"):
        assert path.read_bytes() == (small / "first" / path.name).read_bytes(), path.name


def test_figures_of_several_seeds_are_the_same_again(written: Path, tmp_path: Path) -> None:
    """No point is put anywhere at random, not even to keep points apart."""
    shutil.copytree(written.parent, tmp_path, dirs_exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        report.main(LARGE.cell("report"))
    for path in _outputs(written):
        assert path.read_bytes() == (tmp_path / path.relative_to(written.parent)).read_bytes(), path.name


def test_one_seed_claims_nothing(small: Path) -> None:
    summary = read_json(small / "reports/summary.json")
    assert summary["headline"]["verdict"] == "one pair"
    assert summary["contrasts"]["H1"]["ci_low"] is None
    assert _unknown_numbers(summary["headline"]["sentence"], _derived(summary)) == []


def test_dvc_sees_few_numbers(written: Path) -> None:
    """Lists are passed over by DVC's metrics, so `dvc exp show` has a column for the main numbers only."""
    from dvc.repo.metrics.show import _extract_metrics

    seen = list(_leaves(_extract_metrics(read_json(written / "summary.json"), "summary.json")))
    assert 20 < len(seen) < 40 * len(read_json(written / "summary.json")["arms"])


def test_statistics_of_other_cells_are_refused(small: Path) -> None:
    grown = Experiment(seeds=(0, 1), arms=("sft_gold", "grpo"))
    grown.write(small)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(small)
        with pytest.raises(Invalid, match="run stage contrast"):
            report.main(grown.cell("report"))


def test_no_circuit_anywhere_still_gives_a_report(tmp_path: Path) -> None:
    experiment = Experiment(
        seeds=(0, 1), arms=("sft_gold", "grpo"), contrasts=(("grpo", "sft_gold"),), hidden=frozenset({0, 1})
    )
    experiment.write(tmp_path)
    _run(tmp_path, experiment)
    text = (tmp_path / "reports/report.md").read_text()
    assert "No answer" in text and not re.search(r"\bnan\b", text)
    assert len(list((tmp_path / "reports/figures").iterdir())) == 15


def test_an_unlisted_arm_has_a_look_and_the_words_follow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert style.look("my_arm").label == "my_arm" and style.look("my_arm") == style.look("my_arm")
    monkeypatch.chdir(tmp_path)
    experiment = Experiment(seeds=(0, 1), arms=("sft_gold", "my_arm"), contrasts=(("my_arm", "sft_gold"),))
    experiment.write(tmp_path)
    contrast.main(experiment.cell("contrast"))
    statistics = json.loads(Path("reports/statistics.json").read_text())
    cells = read_cells(report.CELLS, experiment.seeds, experiment.arms)
    names = {model: style.label(model) for model in cells.models}
    summary = summarise(cells, statistics, {}, names)
    summary["table_budgets"], summary["taught_as_gold"] = [], []
    summary["provenance"] = provenance(cells, report.CELLS, {"seeds": [0, 1]})
    pictures = (
        "contrasts",
        "forest",
        "specification",
        "pareto",
        "matchings",
        "circuit",
        "similarity",
        "overlap",
        "sizes",
        "knockout",
        "nulls",
        "forgetting",
        "transplants",
        "desiderata",
        "training",
    )
    text = to_markdown(document(summary), dict.fromkeys(pictures, b""))
    assert "my_arm" in text
