"""The report as a page: HTML and Markdown, made of the same parts by the templates beside this file."""

import base64
from collections.abc import Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from stages.figures.parts import Document

TEMPLATES = Path(__file__).parent / "templates"


def to_html(report: Document, images: Mapping[str, bytes]) -> str:
    """One self-contained page: images are inlined, nothing is fetched, nothing runs.

    Args:
        report: what to say.
        images: figure name -> PNG.
    """
    inlined = {name: "data:image/png;base64," + base64.b64encode(data).decode() for name, data in images.items()}
    return _render("report.html.jinja", report, inlined, escape=True)


def to_markdown(report: Document, images: Mapping[str, bytes]) -> str:
    """The same for a repository page, with images in figures/ beside it."""
    return _render("report.md.jinja", report, {name: f"figures/{name}.png" for name in images}, escape=False)


def _render(template: str, report: Document, images: Mapping[str, str], escape: bool) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template(template).render(report=report, images=images)
