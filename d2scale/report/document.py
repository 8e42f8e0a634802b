"""What a report consists of, before it becomes HTML or Markdown."""

from __future__ import annotations

from typing import NamedTuple


class Cell(NamedTuple):
    """One cell of a table."""

    text: str
    detail: str = ""  # less important, such as the noise of a value
    strong: bool = False


class Table(NamedTuple):
    """A table whose first column names the rows."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    folded: bool = False  # a page shows it only when asked
    in_markdown: bool = True
    wraps: bool = False  # its cells are text that may take several lines


class Picture(NamedTuple):
    """A picture."""

    name: str  # of its file, such as ``total_loss-images.png``
    title: str  # what it shows, for those who cannot see it as well
    light: bytes  # the file's content
    dark: bytes = b""  # for a dark background; empty where ``light`` does for both
    axis: str = ""  # what a curve is drawn against; empty for other pictures
    group: str = ""  # pictures of one group stand side by side


class Section(NamedTuple):
    """A part of a report: paragraphs, then tables, then pictures."""

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


class Document(NamedTuple):
    """A report."""

    title: str
    summary: tuple[str, ...]  # what a reader should know first
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()  # what was skipped, missing or computed
    overview: Picture | None = None  # where there is room for one only; the page has it in parts
