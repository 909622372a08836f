"""The records of all cells that the axes name, and no others: leftovers of a larger matrix are not read."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from stages.pipeline.files import read_json
from stages.pipeline.stage import Invalid
from stages.statistics.retention import add_retention

BASE = "base"
Record = dict[str, Any]

# stage -> the file of one cell, below reports/cells; the first ones exist for the base only, or for tuned
# models only
_OF_BASE = {"pretrain": "pretrain/{seed}/record.json"}
_OF_ARMS = {stage: f"{stage}/{{model}}/{{seed}}.json" for stage in ("match", "cmap", "drift")}
_OF_ARMS["matchings"] = "matchings/{seed}/{model}.json"
_OF_MODELS = {
    "discover": "discover/{model}/{seed}/record.json",
    "circuit": "discover/{model}/{seed}/circuit.json",
    "evaluate": "evaluate/{model}/{seed}.json",
    "dcm": "dcm/{model}/{seed}.json",
}


@dataclass(frozen=True)
class Cells:
    """Records of one experiment.

    Attributes:
        seeds: in the order of params.yaml, as text.
        arms: in the order of params.yaml.
        records: (stage, model, seed) -> record; stage "circuit" is the circuit.json of stage `discover`.
        files: path of every file that was read, relative to the root of the cells.
    """

    seeds: tuple[str, ...]
    arms: tuple[str, ...]
    records: dict[tuple[str, str, str], Record]
    files: tuple[str, ...]

    @property
    def models(self) -> tuple[str, ...]:
        """The base, then the arms."""
        return (BASE, *self.arms)

    def record(self, stage: str, model: str, seed: str) -> Record:
        return self.records[stage, model, seed]

    def value(self, measure: str, model: str, seed: str) -> float | None:
        """The number at "<stage>.<dotted path>" of a cell; None where it is undefined or the cell has no such
        part.

        A cell of a stage that does not exist for the model (`drift` of the base) has no number either.
        """
        stage, *path = measure.split(".")
        value: Any = self.records.get((stage, model, seed))
        for key in path:
            if not isinstance(value, dict):
                return None
            value = value.get(key)
        return float(value) if isinstance(value, int | float) else None

    def imported(self, arm: str) -> bool:
        """Whether the arm was tuned elsewhere: it is no run's checkpoint and like none."""
        match = self.record("match", arm, self.seeds[0])
        return match["like"] is None and match["step"] is None

    def reached(self, arm: str, seed: str) -> bool:
        """Whether the arm reached the matching level; only then is its model comparable with others."""
        return bool(self.record("match", arm, seed)["reached"])


def read_cells(root: Path, seeds: Sequence[int | str], arms: Sequence[str]) -> Cells:
    """Read every record of every cell, and add what takes two of them.

    Args:
        root: folder of the records.
        seeds, arms: the axes.

    Raises:
        Invalid: a file is missing.
    """
    names = tuple(str(seed) for seed in seeds)
    records: dict[tuple[str, str, str], Record] = {}
    files = []
    for stage, model, seed, file in _expected(names, tuple(arms)):
        if not (root / file).is_file():
            raise Invalid(
                f"{root / file} is missing: stage '{stage}' has no result for model '{model}' and seed "
                f"{seed}, which the axes in params.yaml ask for; run dvc repro"
            )
        records[stage, model, seed] = read_json(root / file)
        files.append(file)
    add_retention(records, BASE)
    return Cells(names, tuple(arms), records, tuple(files))


def _expected(seeds: tuple[str, ...], arms: tuple[str, ...]) -> Iterator[tuple[str, str, str, str]]:
    for patterns, having in ((_OF_BASE, (BASE,)), (_OF_MODELS, (BASE, *arms)), (_OF_ARMS, arms)):
        for stage, pattern in patterns.items():
            for model in having:
                for seed in seeds:
                    yield stage, model, seed, pattern.format(model=model, seed=seed)


def long_form(cells: Cells) -> pd.DataFrame:
    """Every scalar of every record: columns stage, model, seed, measure, value.

    Measures are dotted paths in the record. Truth values are 0 and 1, undefined numbers are empty. Texts,
    lists and the settings of a stage stay in the records.
    """
    rows = [
        (stage, model, seed, measure, value)
        for (stage, model, seed), record in cells.records.items()
        if stage != "circuit"  # its numbers are lists; its sizes are in the record of `discover`
        for measure, value in _scalars({k: v for k, v in record.items() if k not in ("settings", "seed")}, "")
    ]
    frame = pd.DataFrame(rows, columns=["stage", "model", "seed", "measure", "value"])
    return frame.astype({"value": "float64"})


def _scalars(value: Any, path: str) -> Iterator[tuple[str, float | None]]:
    if isinstance(value, dict) and value:
        for key, part in sorted(value.items()):
            yield from _scalars(part, f"{path}.{key}" if path else key)
    elif isinstance(value, int | float):
        yield path, float(value)
    elif value is None or value == {}:  # nothing to measure, for instance a circuit that is not identifiable
        yield path, None


def mean_of_defined(values: Iterable[float | None]) -> float | None:
    """The mean of those that are not None; None if there are none."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None
