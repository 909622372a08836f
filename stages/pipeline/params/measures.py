"""What records hold for every tuned model, so that a measure that none of them has is refused before any work.

A measure is "<stage>.<dotted path in its record>". `*` stands for a name that a run gives: of a group of heads, a hop,
a desideratum, a path of attention, or a matching. tests/test_measures.py compares this with real records.
"""

import re
from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from itertools import product
from typing import Annotated

from pydantic import AfterValidator

from stages.measures.scores import ABLATIONS, ENDINGS

SCORES = tuple(ENDINGS)


def _of(*parts: str | Sequence[str]) -> list[str]:
    """Every path with one of the names of each part."""
    return [".".join(path) for path in product(*([part] if isinstance(part, str) else part for part in parts))]


def _each(name: str, values: Sequence[str] = SCORES) -> list[str]:
    """A name with every score in the place of its {}."""
    return [name.format(value) for value in values]


def _shares(*names: str) -> list[str]:
    return [f"{name}{ending}" for name in names for ending in ENDINGS.values()]


_CIRCUIT = ["size", *SCORES, *_shares("faithfulness")]
_KEPT = [*_CIRCUIT, *_shares("retention")]
_DIRECTIONS = ("tuned_to_base", "base_to_tuned")
_INSPECTION = "evaluate.inspection"
_DIVERGENCES = ("kl", "reverse_kl", "tv")
_COMPARED_WITH = ("value", "ceiling", "ceiling_base", "ceiling_tuned", "null_mean", "null_high")
_OVERLAPS = ("share", "jaccard", "corrected")
_EDGES = ("flipped", "weakened", "new")

MEASURES = (
    *_of("evaluate", ["n_old", "n_new", "old_chance", "new_accuracy", "new_valid_mass", *_each("old_{}")]),
    *_of("evaluate", ("circuit", "own_circuit"), _KEPT),
    *_of("evaluate", "circuit_in_queried_clause", _CIRCUIT),
    *_of("evaluate.circuit_by_ablation", ABLATIONS, _KEPT),
    *_of("evaluate.circuit_by_ablation", ("resampled", "base_resampled"), ("from_donor",)),
    *_of("evaluate.flips", ("lost", "gained")),
    *_of("evaluate.groups.*", ["size", *_each("{}_without"), *_each("{}_drop")]),
    *_of("evaluate.groups.*", [*_each("model_{}_without"), *_each("model_{}_drop")]),
    *_of("evaluate.random", ("n", "mean", "max")),
    f"{_INSPECTION}.n",
    *_of(_INSPECTION, "completeness.*", ["size", *_each("circuit_{}"), *_each("model_{}"), *_shares("gap")]),
    *_of(_INSPECTION, "completeness.nothing", _shares("faithfulness")),
    *_of(_INSPECTION, "knockout", ["window", *(f"paths.*.{name}" for name in _shares("everywhere"))]),
    *_of(_INSPECTION, "minimality", ("threshold", "size", "core", "stand_ins", "idle")),
    *_of(_INSPECTION, "minimality", [*SCORES, *_each("core_{}")]),
    *_of(_INSPECTION, "minimality", _shares("core_share")),
    *_of(_INSPECTION, "size_curve", ["circuit_size", "nodes", *_shares("cpr", "cmd", "enough")]),
    *_of("cmap", ("n", "base_accuracy", "tuned_accuracy")),
    *_of("cmap", ("base", "tuned"), SCORES),
    *_of("cmap", _DIRECTIONS, "*", SCORES),
    *_of("cmap.random", _DIRECTIONS, "*", SCORES),
    "cmap.heads.n",
    *_of("cmap.inputs", _DIRECTIONS, ("q", "k", "v"), "*", SCORES),
    *_of("drift", ("old", "new"), _DIVERGENCES),
    *_of("drift", ("weight_norm", "weight_norm_relative", "cka.mean")),
    *_of("drift.relearning", ("target", "steps", "regained", "most_steps")),
    *_of("drift.relearning", ("before", "after"), SCORES),
    *_of("drift.retraced", ("identifiable", *SCORES)),
    *_of("drift.retraced.joint.*", ("base", "tuned")),
    *_of("drift.retraced.similarity", ("together", "hops.*"), ("cosine", "pearson", "spearman"), _COMPARED_WITH),
    "drift.retraced.overlap.nodes",
    *_of("drift.retraced.overlap.at_circuit", ("size", "chance", "chance_jaccard", "layered", "layered_jaccard")),
    *_of("drift.retraced.overlap.at_circuit", _each("{}", _OVERLAPS) + _each("ceiling_{}", _OVERLAPS)),
    *_of("drift.retraced.edges.*", ("size_ratio", "change", "change_raw", "strong")),
    *_of("drift.retraced.edges.*", _each("{}", _EDGES) + _each("{}_noise", _EDGES)),
    *_of("dcm.groups.*.*", ("size", "accuracy", "floor", "all_heads_accuracy", "random_accuracy", "n_test")),
    *_of("match", ("level", "learning_rate", "step", "reached", "weight_norm")),
    *_of("match", ("new_accuracy_selection", "old_accuracy_selection", "overshoot_selection")),
    *_of("match.matchings.*", ("at", "reached", "as_primary")),
    *_of("discover", ("accuracy", "clean", "corrupt", "identifiable", "size")),
    *_of("discover", ("sizes.*", "nodes_per_position.*")),
    *_of("discover.precision", ("examples", "heads", "spearman", "largest_difference", "shared_of_10_strongest")),
    *_of("discover.precision", ("least", "heads_of_least", "spearman_of_least")),
)


@cache
def _pattern() -> re.Pattern[str]:
    return re.compile("|".join(re.escape(path).replace(r"\*", r"[^.]+") for path in MEASURES))


def is_measure(path: str) -> bool:
    """Whether records hold such a number."""
    return _pattern().fullmatch(path) is not None


def _known(path: str) -> str:
    if not is_measure(path):
        near = get_close_matches(path, MEASURES, 1, 0)[0]
        raise ValueError(f"'{path}': no record has it; must be a measure such as '{near}' (see reports/cells.csv)")
    return path


Measure = Annotated[str, AfterValidator(_known)]
