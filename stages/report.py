# pyright: reportArgumentType=false, reportReturnType=false
"""Stage `report`: draw the figures and write the report.

reads  reports/cells/** (records and curves, exactly the cells that seeds and arms name),
reports/statistics.json,
       reports/cells.csv, data/tasks.json, of the old task what statistics.json says of it
writes reports/report.html, reports/report.md, reports/summary.json, reports/figures/*.png

A new figure is one module in stages/figures/, one line in `figures` below, and its place in a section of
stages/figures/sections/; a new section is one module there and one line in stages/figures/document.py.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure

from stages.figures import (
    circuit,
    contrasts,
    desiderata,
    forest,
    forgetting,
    knockout,
    matchings,
    nulls,
    overlap,
    pareto,
    similarity,
    sizes,
    specification,
    training,
    transplants,
)
from stages.figures.document import document, to_html, to_markdown
from stages.figures.style import label, png
from stages.learning.settings import CHOOSING
from stages.measures.scores import ENDINGS, score_of
from stages.pipeline.files import read_json, replacing_directory, write_json, write_text
from stages.pipeline.stage import Cell, Invalid, run
from stages.statistics import frames
from stages.statistics import similarity as circuits
from stages.statistics.budgets import table_of_budgets
from stages.statistics.cells import BASE, Cells, long_form, read_cells
from stages.statistics.matchings import long_table
from stages.statistics.primary import base_measure
from stages.statistics.provenance import provenance
from stages.statistics.summary import summarise
from stages.statistics.wording import number, short_name

CELLS = Path("reports/cells")


def figures(
    cells: Cells, statistics: dict[str, Any], summary: dict[str, Any], curves: pd.DataFrame, max_groups: int
) -> dict[str, Callable[[], Figure]]:
    """Figure name -> what draws it."""
    plan = statistics["plan"]
    primary, level, shortcut = plan["primary"], summary["level"], summary["shortcut"]
    base_old, n = summary["base"]["old_accuracy"], len(cells.seeds)
    seed = cells.seeds[0]
    left_out = [entry["seed"] for entry in summary["bases_left_out"]]
    values = frames.seed_values(cells, ("evaluate.new_accuracy", primary), left_out)
    values = values.rename(columns={"evaluate.new_accuracy": "new_accuracy", primary: "value"})
    arms_only = values[values["model"] != BASE]
    matched = frames.matched_points(cells).rename(
        columns={"new_accuracy_selection": "new_accuracy", "old_accuracy_selection": "old_accuracy"}
    )
    untrained = matched[~matched["arm"].isin(curves[curves["learning_rate"] > 0]["arm"])]
    counts = frames.group_order(cells)
    groups = list(counts)[:max_groups]
    drawn = cells.record("circuit", BASE, seed)
    rate = float(matched["learning_rate"].max())
    floor, task = statistics["similarity"]["floor"], statistics["old_task"]
    return {
        "contrasts": lambda: contrasts.draw(
            arms_only,
            _contrast_rows(statistics),
            short_name(primary),
            statistics["measures"][primary][BASE]["mean"],
            summary["random_floor"],
            plan["equivalence_margin"],
            plan["confidence"],
        ),
        "forest": lambda: forest.draw(
            [e for e in statistics["contrasts"] if e["measure"] == primary][: len(plan["contrasts"])],
            short_name(primary),
            plan["equivalence_margin"],
            plan["confidence"],
        ),
        "specification": lambda: specification.draw(statistics["specification"], plan["equivalence_margin"]),
        "pareto": lambda: pareto.draw(
            curves,
            untrained,
            values.rename(columns={"value": "kept"}),
            level,
            shortcut,
            base_old,
            short_name(primary),
        ),
        "matchings": lambda: matchings.draw(
            long_table(statistics["matchings"], cells.arms, f"retention{ENDINGS[score_of(primary)]}"),
            level,
            base_old,
            len(left_out) < n,
        ),
        "circuit": lambda: circuit.draw(
            frames.circuit_heads(cells, seed),
            frames.circuit_paths(cells, seed),
            frames.head_changes(cells, seed),
            _positions(task, frames.circuit_heads(cells, seed)),
            drawn["n_layers"],
            drawn["n_heads"],
            _notes(cells, primary, seed),
        ),
        "sizes": lambda: sizes.draw(_counted(frames.size_curves(cells)), _circuit_sizes(cells)),
        "knockout": lambda: knockout.draw(
            _counted(frames.knockout_curves(cells)), _window(cells), dict(task["positions"])
        ),
        "nulls": lambda: nulls.draw(_counted(frames.circuits_and_nulls(cells))),
        "similarity": lambda: similarity.draw(_counted(circuits.similarities(cells)), floor["similarity"]),
        "overlap": lambda: overlap.draw(
            _counted(circuits.overlap_curves(cells)), floor["sizes"], floor["overlap"]["share"]
        ),
        "forgetting": lambda: forgetting.draw(curves, base_old, rate),
        "transplants": lambda: transplants.draw(
            _counted(frames.transplants(cells)), [frames.WHOLE, *groups], counts, n, base_old
        ),
        "desiderata": lambda: desiderata.draw(
            _counted(frames.desiderata(cells)), groups, counts, n, dict(task["desiderata"])
        ),
        "training": lambda: training.draw(frames.base_curves(CELLS, cells), curves, level, shortcut),
    }


def _circuit_sizes(cells: Cells) -> list[float]:
    """Number of nodes of every base's circuit."""
    sizes = [cells.value("evaluate.inspection.size_curve.circuit_size", BASE, seed) for seed in cells.seeds]
    return [size for size in sizes if size is not None]


def _window(cells: Cells) -> int:
    """Layers of a knockout window."""
    return int(cells.value("evaluate.inspection.knockout.window", BASE, cells.seeds[0]) or 1)


def _counted(frame: pd.DataFrame) -> pd.DataFrame:
    """The rows of models that are compared: the base, and arms where they reached the matching level."""
    return frame[frame["reached"].astype(bool)]


def _contrast_rows(statistics: dict[str, Any]) -> pd.DataFrame:
    rows = [
        {key: entry[key] for key in ("name", "arm", "reference", "n", "difference", "p")}
        | {"low": (entry["ci"] or [None, None])[0], "high": (entry["ci"] or [None, None])[1]}
        | {"values": list(entry["values"].values())}
        for entry in statistics["contrasts"]
        if entry["measure"] == statistics["plan"]["primary"]
    ]
    columns = ["name", "arm", "reference", "n", "difference", "p", "low", "high", "values"]
    frame = pd.DataFrame(rows, columns=columns)
    return frame.astype({"difference": "float64", "p": "float64", "low": "float64", "high": "float64"})


def _positions(task: dict[str, Any], heads: pd.DataFrame) -> list[str]:
    """The positions of the old task in reading order, and then any other that the circuit has."""
    return list(dict.fromkeys([*(name for name, _ in task["positions"]), *heads["position"]]))


def _notes(cells: Cells, primary: str, seed: str) -> dict[str, str]:
    """A line for each model's drawing of the circuit."""
    faithfulness = number(cells.value(base_measure(primary), BASE, seed), 2)
    notes = {BASE: f"the circuit, faithfulness {faithfulness} (seed {seed})"}
    for arm in cells.arms:
        old = number(cells.value("evaluate.old_accuracy", arm, seed), 2)
        notes[arm] = f"kept {number(cells.value(primary, arm, seed), 2)}, old task {old}"
        if not cells.reached(arm, seed):
            notes[arm] += ", level not reached"
    return notes


def main(cell: Cell) -> None:
    seeds, arms, rates = cell.params("seeds"), cell.params("arms"), cell.params("learning_rates")
    new_task, section = cell.params("new_task"), cell.params("report")
    cells = read_cells(CELLS, seeds, arms)
    statistics = read_json("reports/statistics.json")
    _refuse_stale(cells, statistics)
    tasks = read_json("data/tasks.json")
    shortcuts = tasks["new_tasks"][new_task]["shortcuts"]
    summary = summarise(cells, statistics, shortcuts, {model: label(model) for model in cells.models})
    curves = frames.training_curves(CELLS, cells, rates)
    summary["table_budgets"] = table_of_budgets(curves, tasks["new_tasks"][new_task]["prompt_tokens"])
    one_answer = tasks["new_tasks"][new_task]["valid_answers"] == 1
    summary["taught_as_gold"] = [arm for arm in cells.arms if one_answer and arm in CHOOSING]
    params = {"seeds": seeds, "arms": arms, "learning_rates": rates, "new_task": new_task}
    params |= {f"contrast.{name}": value for name, value in statistics["plan"].items()}
    params |= {"report.dpi": section.dpi, "report.max_groups": section.max_groups}
    summary["provenance"] = provenance(cells, CELLS, params)

    drawings = figures(cells, statistics, summary, curves, section.max_groups)
    images = {name: png(draw(), section.dpi) for name, draw in drawings.items()}
    report = document(summary)
    with replacing_directory("reports/figures") as folder:
        for name, image in images.items():
            (folder / f"{name}.png").write_bytes(image)
    write_json("reports/summary.json", summary)
    write_text("reports/report.md", to_markdown(report, images))
    write_text("reports/report.html", to_html(report, images))


def _refuse_stale(cells: Cells, statistics: dict[str, Any]) -> None:
    """The statistics must be those of these cells."""
    keys = ["stage", "model", "seed", "measure"]
    written = pd.read_csv("reports/cells.csv", dtype={"seed": str})[keys]
    if set(statistics["reach"]) != set(cells.arms) or not written.equals(long_form(cells)[keys]):
        raise Invalid("reports/statistics.json and cells.csv are not of the cells in reports/cells: run stage contrast")


if __name__ == "__main__":
    run("report", (), main)
