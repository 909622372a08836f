"""What a tuned model kept of its base: numbers that take the records of two models.

Stage `evaluate` measures every model by itself, so that the base is measured once. Retention of the base's circuit is
F(circuit in place in the tuned model) / F(the same circuit in place in the base), F being one of the four scores: how
much of what it did is left, whatever else the model has learned. Flips are the shares of old-task
examples that the base answered right and the tuned model does not (lost), and the other way round (gained).
"""

from collections.abc import Mapping, MutableMapping
from typing import Any

from stages.measures.scores import shares

Records = MutableMapping[tuple[str, str, str], dict[str, Any]]  # (stage, model, seed) -> record


def add_retention(records: Records, base: str) -> None:
    """Put `retention`, `retention_ld` and so on beside the scores of every circuit in place, and `flips` into
    `evaluate`.

    Args:
        records: of all cells; those of stages `evaluate` and `matchings` are changed in place.
        base: name of the base among the models.
    """
    for (stage, _, seed), record in records.items():
        if stage not in ("evaluate", "matchings"):
            continue
        reference = records["evaluate", base, seed]
        if stage == "evaluate":
            circuits = [record["circuit"], record["own_circuit"]]
            reference_by = reference.get("circuit_by_ablation") or {}  # of no earlier record
            for kind, circuit in (record.get("circuit_by_ablation") or {}).items():
                circuit |= shares("retention", circuit, reference_by[kind])
            record["flips"] = _flips(record, reference)
        else:
            # records of earlier runs have one learning rate, and no other outputs around the circuit
            found = [({"": rates} if "circuit" in rates else rates).values() for rates in record["matchings"].values()]
            entries = [entry for rates in found for entry in rates]
            circuits = [entry["circuit"] for entry in entries]
            reference_by = reference.get("circuit_by_ablation") or {}
            for kind, circuit in (kind for e in entries for kind in (e.get("circuit_by_ablation") or {}).items()):
                circuit |= shares("retention", circuit, reference_by.get(kind) or {})
        for circuit in circuits:
            if circuit and reference["circuit"]:
                circuit |= shares("retention", circuit, reference["circuit"])


def _flips(record: Mapping[str, Any], reference: Mapping[str, Any]) -> dict[str, float]:
    before, after = reference["examples"]["model"], record["examples"]["model"]
    pairs = list(zip(before, after, strict=True))
    return {
        "lost": pairs.count(("1", "0")) / len(pairs),
        "gained": pairs.count(("0", "1")) / len(pairs),
    }
