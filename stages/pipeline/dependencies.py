"""Which files of this repository each stage runs, found by following its imports.

DVC reruns a stage only for files that `deps` lists, and takes neither globs nor imports into account. Listing some
thirty modules for each cell would keep the lists right only by care, and would make dvc.lock so long that DVC spends
seconds a cell reading and writing it. So stage `code` writes, for every stage, one small file with the digests of what
it runs, and the cells depend on that file: an edit reruns the stages that run the edited module, and no others.

Three packages are told apart:
- `stages/pipeline/params/` is left out: it can only refuse a run, never change what a stage computes, since values
  reach a stage from params.yaml as they are (it holds no defaults).
- the tasks in `stages/tasks/old/` and `stages/tasks/new/` are found by their registries, so who imports these runs all
  of them;
- the arms in `stages/learning/arms/` are imported by name, so each has a file of its own: editing one arm reruns that
  arm's cells only.
"""

import ast
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

VALIDATION_ONLY = "stages/pipeline/params"
ARMS = "stages/learning/arms"
# a registry that finds its modules by their being there -> what it runs
FOUND = {"stages/tasks/old_tasks.py": "stages/tasks/old", "stages/tasks/new_tasks.py": "stages/tasks/new"}
# what is run, but not imported: pins and templates
BESIDES = {
    "contrast": ("requirements.txt",),
    "report": (
        "requirements.txt",
        "stages/figures/templates/report.html.jinja",
        "stages/figures/templates/report.md.jinja",
    ),
}
PINS = ("requirements-compute.txt",)


def manifests(stages: Sequence[str], used: Sequence[str] = ()) -> dict[str, dict[str, str]]:
    """For every stage, and as "finetune/<arm>" for every arm, the digest of each file that it runs.

    Args:
        stages: names of modules in stages/.
        used: arms that params name; those without a file are imported models.
    """
    arms = sorted(path.stem for path in Path(ARMS).glob("*.py") if path.stem != "__init__")
    imported = sorted(set(used) - set(arms))
    found = {stage: _digests(code_of(stage)) for stage in stages}
    if "finetune" in found:
        found |= {f"finetune/{arm}": _digests(code_of("finetune", arm)) for arm in arms}
        found |= {f"finetune/{arm}": found["finetune"] for arm in imported}
        del found["finetune"]
    return found


def code_of(stage: str, arm: str | None = None) -> list[str]:
    """Paths of all files that a stage runs, its own first; of stage `finetune` those for one arm, if it is named."""
    entry = f"stages/{stage}.py"
    todo = [entry] if arm is None else [entry, f"{ARMS}/{arm}.py"]
    found: list[str] = []
    while todo:
        path = todo.pop()
        if path not in found and not path.startswith(f"{VALIDATION_ONLY}/"):
            found.append(path)
            todo.extend(_imports(path))
            todo.extend(sorted(file.as_posix() for file in Path(FOUND[path]).glob("*.py")) if path in FOUND else ())
    return [entry, *sorted(set(found) - {entry}), *BESIDES.get(stage, PINS)]


def _imports(path: str) -> Iterator[str]:
    """Repository modules that one module imports, at top level or inside functions."""
    for node in ast.walk(ast.parse(Path(path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            candidate = Path(*name.split(".")).with_suffix(".py")
            if name.startswith("stages.") and candidate.exists():
                yield candidate.as_posix()


def _digests(paths: list[str]) -> dict[str, str]:
    return {path: hashlib.sha256(Path(path).read_bytes()).hexdigest() for path in paths}
