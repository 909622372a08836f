"""The report of an old task other than entity tracking: its words, and none of entity tracking's."""

import json
import re
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from stages import contrast, report
from stages.figures import desiderata, knockout
from stages.pipeline.files import read_json, write_json
from stages.tasks.old.boxes import Boxes
from stages.tasks.old.ioi import Ioi
from tests.synthetic_records import Experiment

# positions and hypotheses of made-up records of boxes -> of IOI
SAID_SO = {
    "last": "end",
    "query_label": "s2",
    "earlier_label": "s1",
    "earlier_separator": "s1+1",
    "positional": "s_position",
    "object_value": "name_value",
    "box_label_value": "s_identity",
}


def as_ioi(value: Any) -> Any:
    """A record with the names of IOI, without what only a task with clauses has."""
    if isinstance(value, dict):
        kept = {key: part for key, part in value.items() if "another_clause" not in key and key != "next_clause"}
        return {as_ioi(key): None if key == "circuit_in_queried_clause" else as_ioi(kept[key]) for key in kept}
    if isinstance(value, list):
        return [as_ioi(part) for part in value]
    return ">".join(SAID_SO.get(part, part) for part in value.split(">")) if isinstance(value, str) else value


@pytest.fixture
def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A report in which IOI is both old and new task."""
    experiment = Experiment(arms=("sft_gold", "grpo"), contrasts=(("grpo", "sft_gold"),), new_task="ioi")
    experiment.write(tmp_path)
    for path in (tmp_path / "reports/cells").rglob("*.json"):
        path.write_text(json.dumps(as_ioi(json.loads(path.read_text()))))
    write_json(tmp_path / "data/old_task.json", Ioi.described())
    monkeypatch.chdir(tmp_path)
    contrast.main(experiment.cell("contrast"))
    report.main(experiment.cell("report"))
    return tmp_path / "reports"


def test_the_report_has_the_words_of_its_task(written: Path) -> None:
    summary, text = read_json(written / "summary.json"), (written / "report.md").read_text()
    assert f"The old task is {Ioi.title}; the new task is “ioi”" in text
    assert f"if the group carries {Ioi.carried}." in text
    assert "Is the existing mechanism enhanced?" in text, "the new task is the old one"
    assert {row["model"] for row in summary["table_enhancement"]} == {"base", "sft_gold", "grpo"}, "none is published"
    assert not re.search(r"\b(entity tracking|clauses?|box(es)?|next_clause)\b", text)
    assert summary["base"]["queried_clause_faithfulness"] is None


@pytest.mark.parametrize("kind", [Boxes, Ioi])
def test_figures_have_the_words_of_the_task(kind: Any) -> None:
    last, *earlier = reversed(list(kind.positions))
    keys = [*earlier, *(["another_clause"] if kind is Boxes else [])]
    curve = [
        {"model": "base", "seed": "0", "query": last, "key": key, "layer": layer, "accuracy": 0.5, "everywhere": 0.1}
        for key in keys
        for layer in range(3)
    ]
    figure = knockout.draw(pd.DataFrame(curve), 1, kind.positions)
    titles = [title for axes in figure.axes if (title := axes.get_title(loc="left"))]
    words = [kind.positions[key] for key in reversed(earlier)] + (["another clause"] if kind is Boxes else [])
    assert titles == [f"{kind.positions[last]} ↛ {word}" for word in words], "in reading order, the control at the end"
    asked = [
        {"model": "base", "seed": "0", "group": "a", "desideratum": name}
        | {"accuracy": 0.5, "floor": 0.0, "random": 0.1}
        for name in reversed(list(kind.desiderata))
    ]
    figure = desiderata.draw(pd.DataFrame(asked), ["a"], {"a": 1}, 1, kind.desiderata)
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(kind.desiderata.values())
