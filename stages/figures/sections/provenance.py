"""Provenance: the settings, package versions and records that the numbers come from."""

from collections.abc import Mapping, Sequence
from typing import Any

from stages.figures.parts import Section, Table


def _where(settings: Sequence[Mapping[str, str]]) -> str:
    """On which device and in which precision, as records that are not usual say (`Resources.stated`)."""
    said = {key: {e["value"] for e in settings if e["name"].endswith(f".{key}")} for key in ("device", "dtype")}
    if not any(said.values()):
        return "on the CPU, models in float32"
    devices, dtypes = (" or ".join(sorted(said[key])) for key in ("device", "dtype"))
    return f"on {devices or 'cpu'}, models that were looked into in {dtypes or 'float32'} where the settings say so"


def section(summary: Mapping[str, Any]) -> Section:
    """What was run, with which packages, and the digests of the records that were read."""
    found = summary["provenance"]
    return Section(
        "Provenance",
        (
            f"Computed {_where(found['settings'])}, statistics in float64; same params, same bytes. The "
            "hash of a stage is the MD5 of the list of its records' MD5 sums, which are those of dvc.lock "
            "where an output is one file; summary.json lists them all.",
        ),
        (),
        (
            Table("Settings.", ("Name", "Value"), [(e["name"], e["value"]) for e in found["settings"]], 2),
            Table(
                "Packages.",
                ("Package", "Version"),
                [(e["package"], e["version"]) for e in found["versions"]],
                2,
            ),
            Table(
                "Records read.",
                ("Stage", "MD5", "Files"),
                [(e["stage"], e["md5"], str(e["files"])) for e in found["stages"]],
                2,
            ),
        ),
        folded=True,
    )
