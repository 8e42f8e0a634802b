"""A report as Markdown, for a pull request."""

from __future__ import annotations

from urllib.parse import quote

from d2scale.report.document import Cell, Document, Table


def to_markdown(document: Document, folder: str) -> str:
    """Return the report with one picture; ``folder`` holds them all."""
    parts = [f"# {_escape(document.title)}", *map(_escape, document.summary)]
    if document.overview is not None:
        path = quote(f"{folder}/{document.overview.name}")
        parts.append(f"![{_escape(document.overview.title)}]({path})")
    for section in document.sections:
        tables = [table for table in section.tables if table.in_markdown]
        if not tables:
            continue
        parts.append(f"## {_escape(section.title)}")
        parts += map(_escape, section.paragraphs)
        for table in tables:
            parts.append(f"### {_escape(table.title)}")
            parts.append(_table(table))
            parts += map(_escape, table.notes)
    if document.notes:
        parts.append("## Notes")
        parts.append("\n".join(f"- {_escape(note)}" for note in document.notes))
    return "\n\n".join(parts) + "\n"


def _table(table: Table) -> str:
    lines = [_line([_escape(name) for name in table.head])]
    lines.append(_line(["---"] * len(table.head)))
    lines += [_line([_cell(cell) for cell in row]) for row in table.rows]
    return "\n".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(cell: Cell) -> str:
    text = _escape(cell.text)
    text = f"**{text}**" if cell.strong else text
    return f"{text} ({_escape(cell.detail)})" if cell.detail else text


def _escape(text: str) -> str:
    """Keep what comes from run folders from being read as Markdown or HTML."""
    flat = " ".join(text.split())
    for mark in "\\`*_[]<>|":
        flat = flat.replace(mark, f"\\{mark}" if mark not in "<>" else f"&{_NAMES[mark]};")
    return flat


_NAMES = {"<": "lt", ">": "gt"}
