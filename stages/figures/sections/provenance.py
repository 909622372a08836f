"""Provenance: the settings, package versions and records that the numbers come from."""

from collections.abc import Mapping
from typing import Any

from stages.figures.parts import Section, Table


def section(summary: Mapping[str, Any]) -> Section:
    """What was run, with which packages, and the digests of the records that were read."""
    found = summary["provenance"]
    return Section(
        "Provenance",
        (
            "Computed on the CPU, models in float32, statistics in float64; same params, same bytes. The "
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
