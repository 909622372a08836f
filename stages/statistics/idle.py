"""What the bases' circuits do without, in words."""

from stages.statistics.cells import BASE, Cells, mean_of_defined
from stages.statistics.wording import SCORES, count, number


def findings(cells: Cells) -> list[str]:
    """One sentence on the heads that were found and left out of the circuits; none of records from before they were."""
    records = {seed: cells.record("discover", BASE, seed).get("idle") for seed in cells.seeds}
    known = {seed: record for seed, record in records.items() if record}
    if not known:
        return []
    found, left = (mean_of_defined([float(r[key]["size"]) for r in known.values()]) for key in ("found", "left"))
    first = next(iter(known.values()))
    score = first["score"]
    kept = mean_of_defined([r["left"][score] / r["found"][score] for r in known.values() if r["found"][score] > 0])
    groups = sorted({name for r in known.values() for name, entry in r["groups"].items() if entry["idle"]})
    of_groups = [
        f"{name} at {', '.join(f'seed {seed}' for seed, r in known.items() if r['groups'].get(name, {}).get('idle'))}"
        for name in groups
    ]
    whole = f"; whole groups among them: {'; '.join(of_groups)}" if of_groups else ""
    return [
        "Heads that a base does without are no part of its circuit, by a rule that sees the base alone (pruning split; "
        f"what is left has at least {number(1 - first['tolerance'], 2)} of the {SCORES[score]} of what was found): of "
        f"{number(found, 1)} nodes that were found {number(left, 1)} are left, with {number(kept)} of it "
        f"({count(len(known), 'base')}{whole})."
    ]
