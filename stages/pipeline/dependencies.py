"""Which modules of this repository each stage runs, so that dvc.yaml can list them file by file.

DVC reruns a stage only for files that it lists, and takes neither globs nor imports into account. This module follows
the imports of every stage and writes (`--write`) or checks the `stages/*.py` lines of its `deps`.

Two modules are told apart:
- `stages/pipeline/params.py` is left out: it can only refuse a run, never change what a stage computes, since values
  reach a stage from params.yaml as they are (it holds no defaults).
- the arms in `stages/learning/arms/` are imported by name, so `finetune` lists `arms/${item.arm}.py`: editing one arm
  reruns that arm's cells only.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

from ruamel.yaml import YAML

VALIDATION_ONLY = "stages/pipeline/params.py"
ARMS = "stages/learning/arms"
BY_NAME = {"stages/finetune.py": (ARMS, f"{ARMS}/${{item.arm}}.py")}


def code_dependencies(stage: str) -> list[str]:
    """Paths of all repository modules that a stage imports, its own first."""
    entry = f"stages/{stage}.py"
    found: list[str] = []
    templated: list[str] = []
    todo = [entry]
    while todo:
        path = todo.pop()
        if path in found or path == VALIDATION_ONLY:
            continue
        found.append(path)
        todo.extend(_imports(path))
        if path in BY_NAME:
            folder, template = BY_NAME[path]
            templated.append(template)
            for module in sorted(Path(folder).glob("*.py")):
                todo.extend(_imports(module.as_posix()))
    return [entry, *sorted([path for path in found if path != entry] + templated)]


def _imports(path: str) -> Iterator[str]:
    """Repository modules with content that one module imports, at top level or inside functions."""
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


def is_code(dependency: str) -> bool:
    return dependency.startswith("stages/") and dependency.endswith(".py")


def main() -> int:
    """Check dvc.yaml, or rewrite its code dependencies with --write; the exit status is 1 when it is out of date."""
    yaml = YAML()
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    pipeline = yaml.load(Path("dvc.yaml").read_text(encoding="utf-8"))
    stale = []
    for name, stage in pipeline["stages"].items():
        wanted = code_dependencies(name)
        if [dep for dep in stage["deps"] if is_code(dep)] != wanted:
            stale.append(name)
            others = [dep for dep in stage["deps"] if not is_code(dep)]
            stage["deps"] = wanted + others
    if "--write" in sys.argv[1:]:
        with Path("dvc.yaml").open("w", encoding="utf-8") as file:
            yaml.dump(pipeline, file)
    elif stale:
        print(f"dvc.yaml lists other modules than these stages import: {', '.join(stale)}")
        print("run: python -m stages.pipeline.dependencies --write")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
