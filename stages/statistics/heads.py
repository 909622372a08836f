"""Damage of single heads: what one tuned head, transplanted alone, costs the base, by the group it belongs to."""

from collections.abc import Mapping
from typing import Any

from stages.circuits.circuit import Circuit
from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.contrasts import Plan


def table_of_heads(cells: Cells, plan: Plan, left_out: Mapping[str, float | None]) -> list[dict[str, Any]]:
    """By arm and group, over the seeds that count in the contrasts; none where single heads were not transplanted.

    Returns:
        arm, group, the number of `bases` that have such a group and of its `heads` in all; means over the heads of
        `damage` (what the base loses by the tuned model's output there) and `repair` (what the tuned model gains by the
        base's), and the largest damage of a head, in shares of the base's logit difference.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    bases: dict[tuple[str, str], set[str]] = {}
    for arm in cells.arms:
        for seed in cells.seeds:
            record = cells.record("cmap", arm, seed).get("heads")
            if record is None or seed in left_out or not cells.reached(arm, seed):
                continue
            alone = {(*entry["head"], entry["position"]): entry for entry in record["alone"]}
            for group in Circuit.from_json(cells.record("circuit", BASE, seed)).groups:
                key = (arm, group.name)
                bases.setdefault(key, set()).add(seed)
                found.setdefault(key, []).extend(alone[node.layer, node.head, node.position] for node in group.nodes)
    return [
        {
            "arm": arm,
            "group": group,
            "bases": len(bases[arm, group]),
            "heads": len(entries),
            "damage": mean_of_defined([entry["damage"] for entry in entries]),
            "repair": mean_of_defined([entry["repair"] for entry in entries]),
            "most": max((e["damage"] for e in entries if e["damage"] is not None), default=None),
        }
        for (arm, group), entries in found.items()
    ]
