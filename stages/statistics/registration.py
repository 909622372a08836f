"""Was this experiment registered before it ran? Of a registered one all params are in reports/registered/<name>.yaml.

What these params mean, and what each outcome will be called, is said in reports/registration.md. The two were committed
before any of the seeds ran; the digest of the params stands in the report, so that the commit can be looked up.
"""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path("reports/registered")
PILOTS = range(8)  # seeds that rules, levels and rates were chosen on; no registered experiment may count them
_OF_NO_MATTER = "report."  # how things are drawn


def standing(params: Mapping[str, Any], folder: Path = FOLDER) -> dict[str, Any]:
    """Entry `registration` of statistics.json.

    Args:
        params: of the experiment, as in its params.yaml.
        folder: of the registered ones.

    Returns:
        `kind`: confirmatory (all params are those of a registered experiment), part (all but the seeds, of which some
        have not run) or exploratory; `name` of the registered experiment that differs least, None if there is none, its
        `digest` (SHA-256 of its file), the params that `differ` from it, and which seeds were `pilots`.
    """
    own = dict(_leaves(params))
    nearest: tuple[list[str], Path, set[int]] | None = None
    seeds = set(params.get("seeds") or ())
    for path in sorted(folder.glob("*.yaml")):
        theirs = dict(_leaves(read_params(path)))
        differ = sorted(key for key in own.keys() | theirs.keys() if own.get(key) != theirs.get(key))
        if nearest is None or len(differ) < len(nearest[0]):
            nearest = differ, path, set(theirs.get("seeds") or ())
    differ, path, registered = nearest or ([], None, set())
    kind = "exploratory" if path is None or differ else "confirmatory"
    if differ == ["seeds"] and seeds < registered:
        kind = "part"
    return {
        "kind": kind,
        "name": path and path.stem,
        "digest": path and hashlib.sha256(path.read_bytes()).hexdigest(),
        "differ": differ,
        "pilots": sorted(seed for seed in seeds if seed in PILOTS),
    }


def read_params(path: Path) -> Any:
    """Values as they are written; rates may be texts (1e-4), which is all the same for a comparison of files that DVC
    wrote."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, part in value.items():
            yield from _leaves(part, f"{path}{key}.")
    elif not path.startswith(_OF_NO_MATTER):
        yield path.rstrip("."), value


def sentence(found: Mapping[str, Any]) -> str:
    """The same for a reader."""
    if found["kind"] == "exploratory":
        pilots = ", ".join(str(seed) for seed in found["pilots"])
        used = f"; seeds {pilots} are pilots, on which rules and levels were chosen" if pilots else ""
        nearest = f" (it differs from '{found['name']}' in {len(found['differ'])} params)" if found["name"] else ""
        return f"Exploratory: this experiment was not registered{nearest}{used}."
    digest = f"'{found['name']}', SHA-256 {found['digest'][:12]}"
    if found["kind"] == "part":
        return f"A part of the registered experiment {digest}: some of its seeds have not run."
    return f"Confirmatory: registered in reports/registration.md before it ran ({digest})."
