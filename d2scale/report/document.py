"""What a report consists of, before it becomes HTML or Markdown."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: the value.
        detail: what belongs to it and is less important, such as its noise.
        strong: whether it stands out.
    """

    text: str
    detail: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table whose first column names the rows.

    Attributes:
        title: one line.
        head: of all columns.
        rows: as many cells as the head has.
        notes: sentences under it.
        folded: whether a page shows it only when asked.
        in_markdown: whether a pull request shows it.
        wraps: whether its cells are text that may take several lines.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()
    folded: bool = False
    in_markdown: bool = True
    wraps: bool = False


@dataclass(frozen=True)
class Picture:
    """A picture.

    Attributes:
        name: of its file, such as ``total_loss-images.png``.
        title: what it shows, for those who cannot see it as well.
        light: the file's content, for a light background.
        dark: the same for a dark one; empty where ``light`` does for both.
        axis: what a curve is drawn against; empty for other pictures.
        group: pictures of one group stand side by side.
    """

    name: str
    title: str
    light: bytes
    dark: bytes = b""
    axis: str = ""
    group: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Attributes:
        title: one line.
        paragraphs: above the rest.
        tables: in order.
        pictures: below the tables.
    """

    title: str
    paragraphs: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()


@dataclass(frozen=True)
class Document:
    """A report.

    Attributes:
        title: one line.
        summary: what a reader should know first.
        sections: in order.
        notes: what was skipped, missing or computed.
        overview: the picture for where there is room for one only; the page has it in parts.
    """

    title: str
    summary: tuple[str, ...]
    sections: tuple[Section, ...]
    notes: tuple[str, ...] = ()
    overview: Picture | None = None
