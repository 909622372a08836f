"""Presets as differences on params.yaml, composed with what is behind `dvc exp run -S`.

    python -m stages.pipeline.overrides full           such a difference as arguments of DVC: dvc exp run $(...)

A preset, `stages/presets/<preset>.yaml`, holds what differs and nothing else, so that a new param breaks none. It is
flattened to overrides (`match.level=0.9`), and DVC applies these, and those of the command line, to a copy of
params.yaml: keys that are not there are refused, most comments stay.

Hydra's config groups, which DVC composes with `hydra.enabled`, were considered and left, by what DVC's code does with
them: the values would have to move to `conf/`, params.yaml would be written anew from there by each `dvc exp run`,
without its comments and over what was edited in it, and `dvc repro` would not compose at all.
"""

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stages.pipeline.command import exit_status
from stages.pipeline.params import parse_yaml
from stages.pipeline.stage import PARAMS_FILE, Invalid

PRESETS = Path("stages/presets")
ARMS = "finetune."  # below it, a preset may name what params.yaml does not: models to import
_PLAIN = re.compile(r"[A-Za-z_][\w-]*")  # text that needs no quotes
_WORDS = re.compile("null|true|false|nan|inf", re.IGNORECASE)  # which without them would be no text


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def compose(source: Path, target: Path, preset: Path | None, changes: Sequence[str]) -> None:
    """Write a params file with a preset and then single changes applied to it.

    Args:
        source: a whole params file.
        target: where the other is written; may be the same.
        preset: a file that holds what differs, or None.
        changes: overrides in the syntax of `dvc exp run -S`.

    Raises:
        Invalid: the preset or a change is none, or names a param that the source lacks.
    """
    wanted = _of_params(changes)
    if preset is not None:
        base = parse_yaml(source.read_text(encoding="utf-8"))
        wanted = [*flattened(_difference(preset), base), *wanted]
    if source.resolve() != target.resolve():
        shutil.copy2(source, target)
    # all at once: a second round of DVC's may trip over what it makes of comments after lists in the first
    if wanted:
        _apply(target, wanted)


def flattened(difference: Mapping[str, Any], base: Any, prefix: str = "") -> Iterator[str]:
    """The overrides that make a difference on `base`, one for each value; a mapping is one where `base` has none."""
    for key, value in difference.items():
        below = base.get(key) if isinstance(base, Mapping) else None
        if isinstance(value, Mapping) and isinstance(below, Mapping):
            yield from flattened(value, below, f"{prefix}{key}.")
        else:
            new = "+" if prefix == ARMS and below is None else ""  # an imported arm, which params check
            yield f"{new}{prefix}{key}={_literal(value)}"


def _difference(preset: Path) -> dict[str, Any]:
    found = parse_yaml(preset.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise Invalid(f"{preset} must hold a mapping of what differs from {PARAMS_FILE}")
    return found


def _literal(value: Any) -> str:
    """A value in Hydra's grammar, without spaces of its own."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{_literal(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_literal, value)) + "]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    text = str(value)
    if not isinstance(value, str) or (_PLAIN.fullmatch(text) and not _WORDS.fullmatch(text)):
        return text
    return "'" + text.replace("'", "\\'") + "'"


def _of_params(changes: Sequence[str]) -> list[str]:
    from dvc.utils.cli_parse import to_path_overrides

    found = to_path_overrides(changes)
    for path in found:
        if path != str(PARAMS_FILE):
            raise Invalid(f"-S {path}:{found[path][0]}: must be of {PARAMS_FILE}, the only file of params here")
    return found.get(str(PARAMS_FILE), [])


def _apply(target: Path, overrides: list[str]) -> None:
    from dvc.exceptions import InvalidArgumentError
    from dvc.utils.hydra import apply_overrides, to_hydra_overrides
    from hydra.errors import OverrideParseException

    for override in overrides:
        try:
            parsed = to_hydra_overrides([override])
        except OverrideParseException:
            raise Invalid(f"-S {override}: must be <param>=<value> as `dvc exp run -S` takes it") from None
        if any(one.is_sweep_override() for one in parsed):
            raise Invalid(f"-S {override}: must be one value; a list stands in brackets, [1,2]")
    try:
        apply_overrides(target, overrides)
    except (InvalidArgumentError, ValueError) as error:  # the latter of a path that goes on below a list
        reason = str(error.__cause__ or error).partition("\n")[0].rstrip(".")
        raise Invalid(f"{reason}: must be a param that {PARAMS_FILE} has") from error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m stages.pipeline.overrides", description="A preset for DVC.")
    parser.add_argument("preset", choices=preset_names())
    preset = PRESETS / f"{parser.parse_args().preset}.yaml"

    def say() -> int:
        for override in flattened(_difference(preset), parse_yaml(PARAMS_FILE.read_text(encoding="utf-8"))):
            print(f"-S {override}")
        return 0

    return exit_status(say)


if __name__ == "__main__":
    raise SystemExit(main())
