"""What a report rests on: settings, package versions and the hashes of every record that was read."""

import hashlib
import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from stages.statistics.cells import Cells

PACKAGES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "numpy",
    "scipy",
    "statsmodels",
    "pandas",
    "matplotlib",
    "dvc",
)


def provenance(cells: Cells, root: Path, params: Mapping[str, Any]) -> dict[str, Any]:
    """Lists only, so that DVC does not take them for metrics.

    Args:
        cells: what was read.
        root: folder of the records.
        params: params that the report itself reads, by name.
    """
    files = [{"file": file, "md5": hashlib.md5((root / file).read_bytes()).hexdigest()} for file in sorted(cells.files)]
    return {
        "versions": [{"package": "python", "version": platform.python_version()}]
        + [{"package": name, "version": _version(name)} for name in PACKAGES],
        "settings": [{"name": name, "value": _text(value)} for name, value in params.items()] + _settings(cells),
        "files": files,
        "stages": [_of_stage(stage, files) for stage in dict.fromkeys(entry["file"].split("/")[0] for entry in files)],
    }


def _of_stage(stage: str, files: list[dict[str, str]]) -> dict[str, Any]:
    own = [entry for entry in files if entry["file"].startswith(f"{stage}/")]
    joined = "".join(f"{entry['md5']}  {entry['file']}\n" for entry in own)
    return {"stage": stage, "files": len(own), "md5": hashlib.md5(joined.encode()).hexdigest()}


def _settings(cells: Cells) -> list[dict[str, str]]:
    """Settings that stages wrote into their records; values that differ between cells are joined by "or"."""
    found: dict[str, list[str]] = {}
    for (stage, _, _), record in cells.records.items():
        stated = {k: record[k] for k in ("rule", "level", "learning_rate") if k in record} if stage == "match" else {}
        settings = record.get("settings")
        stated |= settings if isinstance(settings, dict) else {}
        for name, value in stated.items():
            texts = found.setdefault(f"{stage}.{name}", [])
            if (text := _text(value)) not in texts:
                texts.append(text)
    return [{"name": name, "value": " or ".join(texts)} for name, texts in sorted(found.items())]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_text(part)}" for name, part in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(f"[{_text(part)}]" if isinstance(part, list | tuple) else _text(part) for part in value)
    return "none" if value is None else str(value)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"
