"""A report as one HTML page that needs nothing else: no server, no network, no script."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from d2scale import __version__
from d2scale.report.document import Cell, Document, Picture, Section, Table

_STYLE = "page.css"
_MEDIA_TYPES = {"png": "image/png", "jpg": "image/jpeg"}
# Of the curves; the first is shown until the reader chooses another. page.css knows the names.
_AXES = (("images", "images seen"), ("iterations", "iterations"), ("time", "time"))


def to_html(document: Document) -> str:
    """Return the page; pictures are inside it as data URIs."""
    style = (files("d2scale.report") / _STYLE).read_text(encoding="utf-8")
    title = escape(document.title)
    body = [f"<h1>{title}</h1>", *_paragraphs(document.summary, "summary")]
    body += [_section(section) for section in document.sections]
    if document.notes:
        body.append(f"<section><h2>Notes</h2>{_list(document.notes)}</section>")
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{title}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + f"\n<footer>Written by d2scale {escape(__version__)}</footer>"
        + "\n</main>\n</body>\n</html>\n"
    )


def _paragraphs(lines: Sequence[str], name: str = "") -> list[str]:
    attribute = f' class="{name}"' if name else ""
    return [f"<p{attribute}>{escape(line)}</p>" for line in lines]


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _section(section: Section) -> str:
    parts = [f"<h2>{escape(section.title)}</h2>", *_paragraphs(section.paragraphs)]
    parts += [_table(table) for table in section.tables]
    if any(picture.axis for picture in section.pictures):
        parts.append(_curves(section.pictures))
    else:
        parts += _groups(section.pictures)
    return "<section>" + "\n".join(parts) + "</section>"


def _groups(pictures: Sequence[Picture]) -> list[str]:
    """Return pictures in rows, one a group."""
    groups: dict[str, list[Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.group, []).append(picture)
    return [
        f'<div class="pictures">{"".join(_figure(picture) for picture in group)}</div>'
        for group in groups.values()
    ]


def _table(table: Table) -> str:
    title = escape(table.title)
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in table.head)
    rows = "\n".join(_row(row) for row in table.rows)
    kind = "wide wraps" if table.wraps else "wide"
    inner = (
        f'<div class="{kind}" role="region" aria-label="{title}" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>"
    )
    inner += "".join(_paragraphs(table.notes, "note"))
    if table.folded:
        return f"<details><summary>{title}</summary>{inner}</details>"
    return f"<h3>{title}</h3>{inner}"


def _row(row: tuple[Cell, ...]) -> str:
    first, *others = row
    cells = "".join(f"<td>{_cell(cell)}</td>" for cell in others)
    return f'<tr><th scope="row">{_cell(first)}</th>{cells}</tr>'


def _cell(cell: Cell) -> str:
    text = escape(cell.text)
    text = f"<strong>{text}</strong>" if cell.strong else text
    return f"{text}<small>{escape(cell.detail)}</small>" if cell.detail else text


def _curves(pictures: Sequence[Picture]) -> str:
    """Return the pictures of all axes, and buttons of which style sheets show one's alone."""
    told = {picture.axis for picture in pictures}
    axes = [(axis, title) for axis, title in _AXES if axis in told]
    buttons = []
    for number, (axis, title) in enumerate(axes):
        checked = " checked" if not number else ""
        buttons.append(f'<input type="radio" name="axis" id="axis-{axis}"{checked}>')
        buttons.append(f'<label for="axis-{axis}">{escape(title)}</label>')
    groups = []
    for axis, _ in axes:
        figures = "".join(_figure(picture) for picture in pictures if picture.axis == axis)
        groups.append(f'<div class="pictures curves by-{axis}">{figures}</div>')
    return (
        '<div class="chooser" role="group" aria-label="axis">'
        '<span class="against">against</span>' + "".join(buttons) + "".join(groups) + "</div>"
    )


def _figure(picture: Picture) -> str:
    title = escape(picture.title)
    image = f'<img src="{_uri(picture.name, picture.light)}" alt="{title}">'
    if picture.dark:
        dark = _uri(picture.name, picture.dark)
        image = (
            f'<picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
            f"{image}</picture>"
        )
    # A curve has its title in the picture.
    caption = "" if picture.axis else f"<figcaption>{title}</figcaption>"
    return f"<figure>{image}{caption}</figure>"


def _uri(name: str, content: bytes) -> str:
    media_type = _MEDIA_TYPES[name.rpartition(".")[2]]
    return f"data:{media_type};base64,{b64encode(content).decode('ascii')}"
