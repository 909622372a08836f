"""What every stage does before and around its work: arguments, declared params, one clear sentence on bad input.

A stage is `python -m stages <name> [axis values]`. It may read only the params that dvc.yaml declares for it, because
DVC reruns a stage only for declared params: a read of any other one is refused here instead of going untracked.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from stages.pipeline.hub import stay_offline
from stages.pipeline.memory import keep_freed_memory, keep_what_exists

PARAMS_FILE = Path("params.yaml")
PIPELINE_FILE = Path("dvc.yaml")


class Invalid(ValueError):
    """Bad input of a user: one sentence that names the parameter, the value and what is valid."""


@dataclass(frozen=True)
class Cell:
    """One stage at one point of its matrix, for example stage `match` with item {"arm": "grpo", "seed": "0"}."""

    stage: str
    item: dict[str, str]

    def params(self, path: str) -> Any:
        """The validated section or value at a dotted path of params.yaml.

        Raises:
            KeyError: dvc.yaml does not declare the path for this stage (a mistake in the code, not of the user).
        """
        declared = declared_params(self.stage, self.item)
        if not any(path == prefix or path.startswith(prefix + ".") for prefix in declared):
            raise KeyError(f"stage '{self.stage}' reads '{path}', which dvc.yaml does not declare for it")
        return _at(path)

    def undeclared(self, path: str) -> Any:
        """The same of a path that need not be declared: for a check that can only refuse the run, as in params."""
        return _at(path)


def declared_params(stage: str, item: dict[str, str]) -> list[str]:
    """The dotted param paths that dvc.yaml declares for one cell of a stage."""
    entry = _pipeline(PIPELINE_FILE.read_text(encoding="utf-8"))["stages"][stage]
    paths = [str(path) for path in entry.get("params", [])]
    for axis, value in item.items():
        paths = [path.replace(f"${{item.{axis}}}", value) for path in paths]
    return paths


@cache
def _pipeline(text: str) -> Any:
    return yaml.safe_load(text)


def run(stage: str, axes: tuple[str, ...], work: Callable[[Cell], None]) -> None:
    """Run one cell of a stage from the command line; the exit status is 2 on bad input."""
    values = sys.argv[1:]
    try:
        if len(values) != len(axes):
            raise Invalid(f"usage: python -m stages {stage} {' '.join(f'<{axis}>' for axis in axes)}".rstrip())
        params = _validated()
        item = dict(zip(axes, values, strict=True))
        for axis, value in item.items():
            valid = [str(entry) for entry in getattr(params, axis + "s")]
            if value not in valid:
                raise Invalid(f"{axis} = '{value}': must be one of {', '.join(valid)}, as {axis}s in params.yaml say")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        stay_offline()
        from stages.pipeline.resources import claim_device  # which needs this module

        claim_device()
        keep_freed_memory()
        keep_what_exists()
        work(Cell(stage, item))
        keep_what_exists()  # the process ends: nothing is worth collecting
    except Invalid as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _at(path: str) -> Any:
    value: Any = _validated()
    for key in path.split("."):
        value = value[key] if isinstance(value, dict) else getattr(value, key)
    return value


_cache: dict[str, Any] = {}


def _validated() -> Any:
    """params.yaml as validated objects; read once a process."""
    if "params" not in _cache:
        from stages.pipeline.params import load_params

        _cache["params"] = load_params(PARAMS_FILE)
    return _cache["params"]
