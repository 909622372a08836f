"""Reading a params file: its YAML, and one sentence on the first thing that is wrong with it."""

import re
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from stages.pipeline.params.checks import check
from stages.pipeline.params.whole import Params
from stages.pipeline.stage import Invalid


class _Loader(yaml.SafeLoader):
    """PyYAML's, which also takes 1e-5 for a number, as YAML 1.2 does, and DVC, which writes numbers so."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def parse_yaml(text: str) -> Any:
    """What params, or a value of one, say.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def load_params(path: str | Path) -> Params:
    """Read and check a params file as a whole.

    Raises:
        Invalid: one sentence on the first problem found.
    """
    try:
        data = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Invalid(f"there is no {path} here; run from the top of the repository") from None
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        raise Invalid(f"{path} is not valid YAML{'' if line is None else f', near line {line + 1}'}") from None
    if not isinstance(data, dict):
        raise Invalid(f"{path} must hold a mapping of sections")
    try:
        params = Params.model_validate(data)
    except ValidationError as error:
        raise Invalid(_sentence(error)) from None
    check(params)
    return params


def _sentence(error: ValidationError) -> str:
    """The first problem of a pydantic error as one sentence with parameter, value and what is valid."""
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "missing":
        return f"params.yaml: {where} is missing"
    if first["type"] == "extra_forbidden":
        return f"params.yaml: {where} is not a known parameter"
    if first["type"] == "value_error":
        return f"params.yaml: {where or 'params'}: {first.get('ctx', {}).get('error', first['msg'])}"
    value = repr(first["input"])
    value = value if len(value) <= 60 else value[:57] + "..."
    message = first["msg"].removeprefix("Input should be ").removeprefix("a ")
    return f"params.yaml: {where} = {value}: must be {message}"
