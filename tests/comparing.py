"""How far two records are from being equal."""

from collections.abc import Mapping
from typing import Any


def record_difference(ours: Any, other: Any) -> float:
    """Largest absolute difference between the floats of two records; everything else in them must be equal."""
    if isinstance(ours, Mapping):
        assert list(ours) == list(other)
        return max((record_difference(ours[key], other[key]) for key in ours), default=0.0)
    if isinstance(ours, list | tuple):
        assert len(ours) == len(other)
        return max(map(record_difference, ours, other), default=0.0)
    if isinstance(ours, float) and isinstance(other, float):
        return abs(ours - other)
    assert ours == other
    return 0.0
