"""What a report is made of: sections of paragraphs, pictures and tables, as plain data without any markup."""

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Picture:
    """A figure of the report.

    Attributes:
        name: its file is figures/<name>.png.
        caption: what to look at, and what one sees.
    """

    name: str
    caption: str


@dataclass(frozen=True)
class Table:
    """A table of texts; the first `text_columns` columns are words, the others numbers."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    text_columns: int = 1


@dataclass(frozen=True)
class Section:
    """A part of the report; `folded` ones are closed at first in HTML."""

    title: str
    paragraphs: Sequence[str] = ()
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: bool = False


@dataclass(frozen=True)
class Document:
    """The report.

    Attributes:
        title, question, answer: at its head.
        limits: which bases are left out, and what the number of pairs allows to say.
        how_to_read: one line for those who were not there.
        sections: in order.
    """

    title: str
    question: str
    answer: str
    limits: str
    how_to_read: str
    sections: Sequence[Section] = field(default_factory=tuple)
