"""A report as one HTML page that needs nothing else: no server, no network, no script."""

from __future__ import annotations

from base64 import b64encode
from html import escape
from importlib.resources import files

from d2scale.report.document import Cell, Document, Picture, Section, Table

_STYLE = "page.css"
_MEDIA_TYPES = {".png": "image/png", ".jpg": "image/jpeg"}


def to_html(document: Document) -> str:
    """Return the page; pictures are inside it as data URIs."""
    style = (files("d2scale.report") / _STYLE).read_text(encoding="utf-8")
    title = escape(document.title)
    body = [f"<h1>{title}</h1>"]
    body += [f'<p class="summary">{escape(line)}</p>' for line in document.summary]
    body += [_section(section) for section in document.sections]
    if document.notes:
        body.append(_section(Section("Notes")) + _list(document.notes))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _list(lines: tuple[str, ...]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>"]
    parts += [f"<p>{escape(text)}</p>" for text in section.paragraphs]
    parts += [_table(table) for table in section.tables]
    parts += [_figure(picture) for picture in section.pictures]
    return "\n".join(parts)


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = "".join(_row(row) for row in table.rows)
    inner = (
        f'<div class="wide" tabindex="0"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )
    inner += "".join(f'<p class="note">{escape(note)}</p>' for note in table.notes)
    title = escape(table.title)
    if table.folded:
        return f"<details><summary>{title}</summary>{inner}</details>"
    return f"<h3>{title}</h3>{inner}"


def _row(row: tuple[Cell, ...]) -> str:
    first, *others = row
    cells = "".join(f"<td{' class=weak' if c.weak else ''}>{_cell(c)}</td>" for c in others)
    return f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    return f"{text}<small>{escape(cell.detail)}</small>" if cell.detail else text


def _figure(picture: Picture) -> str:
    title = escape(picture.title)
    image = f'<img src="{_uri(picture, picture.light)}" alt="{title}">'
    if picture.dark:
        dark = _uri(picture, picture.dark)
        image = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f"{image}</picture>"
        )
    return f"<figure>{image}<figcaption>{title}</figcaption></figure>"


def _uri(picture: Picture, content: bytes) -> str:
    suffix = picture.name[picture.name.rindex(".") :]
    return f"data:{_MEDIA_TYPES[suffix]};base64,{b64encode(content).decode('ascii')}"
