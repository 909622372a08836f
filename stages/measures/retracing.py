"""A circuit's hops measured again in another model: the same senders, receivers and positions, by exact path patching.

Nothing is searched or selected, so the same edges have a number in both models, whichever head is still used.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stages.circuits.circuit import Component
from stages.circuits.patcher import Patcher
from stages.circuits.scores import Metric, half_scores
from stages.circuits.sweep import Receivers


def retrace(
    patcher: Patcher, metric: Metric, hops: Sequence[Mapping[str, Any]], scored: Sequence[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Measure the hops of a record of stage `discover`.

    Args:
        patcher: of the model in which they are measured.
        metric: what effects are scored by.
        hops: entries with name, position, component and feeds.
        scored: names of the hops whose heads are measured one by one, as they were in the base.

    Returns:
        "<hop>.half0" and "<hop>.half1" of those, [layers h], and for every hop that feeds something the score of all
        heads together.

    Raises:
        Invalid: there are fewer than four examples.
    """
    arrays: dict[str, np.ndarray] = {}
    joint: dict[str, float] = {}
    hops = [hop for hop in hops if hop["component"] is None or hop["feeds"]]
    for position in dict.fromkeys(hop["position"] for hop in hops):  # hops at a position share a sweep
        here = [hop for hop in hops if hop["position"] == position]
        for hop, effect in zip(here, patcher.joint_effects(position, [_receivers(hop) for hop in here]), strict=True):
            joint[hop["name"]] = float(patcher.scored(metric, effect).score)
        single = [hop for hop in here if hop["name"] in scored]
        for hop, effect in zip(
            single, patcher.head_effects(position, [_receivers(hop) for hop in single]), strict=True
        ):
            halves = half_scores(metric, effect, patcher.clean, patcher.corrupt)
            arrays |= {f"{hop['name']}.half{number}": half.numpy() for number, half in enumerate(halves)}
    return arrays, joint


def _receivers(hop: Mapping[str, Any]) -> Receivers:
    component = None if hop["component"] is None else Component(hop["component"])
    return Receivers(component, tuple((layer, head) for layer, head in hop["feeds"]))
