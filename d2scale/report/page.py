"""A report as one HTML page that needs nothing else, and as Markdown for a pull request."""

from __future__ import annotations

import mimetypes
from base64 import b64encode
from typing import Any

from jinja2 import Environment, PackageLoader
from markupsafe import Markup

from d2scale import __version__
from d2scale.report.document import Document
from d2scale.report.history import AXES

# Names and settings come from run folders: both environments escape every value that they show.
_OPTIONS: dict[str, Any] = {
    "loader": PackageLoader("d2scale.report"),
    "trim_blocks": True,
    "lstrip_blocks": True,
}
_MARKDOWN = str.maketrans({"<": "&lt;", ">": "&gt;", **{mark: f"\\{mark}" for mark in "\\`*_[]|"}})


def to_html(document: Document) -> str:
    """Return the page; pictures are inside it as data URIs."""
    template = Environment(autoescape=True, **_OPTIONS).get_template("page.html")
    return template.render(document=document, axes=AXES, version=__version__, data_uri=_data_uri)


def _data_uri(name: str, content: bytes) -> str:
    return f"data:{mimetypes.guess_type(name)[0]};base64,{b64encode(content).decode()}"


def to_markdown(document: Document, folder: str) -> str:
    """Return the report with one picture; ``folder`` holds them all."""
    environment = Environment(autoescape=False, finalize=_escape, **_OPTIONS)  # noqa: S701
    return environment.get_template("page.md").render(document=document, folder=folder)


def _escape(value: object) -> str:
    """Return a value as Markdown that shows it on one line, unless the template marks it safe."""
    return value if isinstance(value, Markup) else " ".join(str(value).split()).translate(_MARKDOWN)
