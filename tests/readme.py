"""Blocks of README.md, for tests that run them as they stand there."""

import re
from pathlib import Path

from tests.conftest import REPOSITORY


def block(name: str) -> str:
    """The text of the block that README marks with a name."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    [found] = re.findall(rf"<!-- example: {name} -->\n```\w+\n(.*?)```", text, re.DOTALL)
    return found


def commands() -> list[str]:
    """The commands in README's blocks that have no language, without what is said behind them."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    lines = [line for language, body in blocks if not language for line in body.splitlines()]
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def write_block(name: str, root: Path) -> Path:
    """Write a block to the file that its first line names; returns that."""
    text = block(name)
    path = root / text.partition("\n")[0].removeprefix("# ")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
