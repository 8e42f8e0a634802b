"""Writing a report: all of its files, or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import folder_faults

# Marks a folder of pictures as written here, so that it may be replaced.
_MARKER = ".made-by-d2scale-report"


@dataclass(frozen=True)
class ReportFiles:
    """Where a report stands.

    Attributes:
        html: the page.
        markdown: tables for a pull request.
        pictures: the pictures, each a file.
        notes: what was skipped, missing or computed.
    """

    html: Path
    markdown: Path
    pictures: tuple[Path, ...]
    notes: tuple[str, ...] = ()


def picture_folder(output: Path) -> Path:
    """Return the folder of the pictures of the page ``output``."""
    return output.with_name(f"{output.stem}_files")


def check_output(output: Path) -> None:
    """Refuse a place where a report cannot be written, before any work is done.

    Raises:
        ConfigError: with the reason.
    """
    folder = picture_folder(output)
    if output.suffix != ".html":
        raise _fault(output, "a file that ends in .html", "name it so")
    if output.is_dir():
        raise _fault(output, "a file", "it is a folder; choose another name")
    if folder.exists() and not (folder / _MARKER).is_file():
        advice = f"choose another name ({folder} is needed for pictures, and holds other files)"
        raise _fault(output, "a report with a folder of its own", advice)
    if faults := folder_faults(output.parent, key="--output"):
        raise ConfigError(faults)


def write_files(
    output: Path, html: str, markdown: str, pictures: Mapping[str, bytes]
) -> ReportFiles:
    """Write everything beside its place, then rename it into place.

    Raises:
        ConfigError: if that cannot be done; then an older report is still there.
    """
    check_output(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".report-") as scratch:
            new = Path(scratch)
            (new / "files").mkdir()
            (new / "files" / _MARKER).touch()
            for name, content in pictures.items():
                (new / "files" / name).write_bytes(content)
            (new / "page").write_text(html, encoding="utf-8")
            (new / "markdown").write_text(markdown, encoding="utf-8")
            folder = picture_folder(output)
            if folder.exists():
                os.replace(folder, new / "old")
            os.replace(new / "files", folder)
            os.replace(new / "markdown", output.with_suffix(".md"))
            os.replace(new / "page", output)
    except OSError as error:
        raise _fault(output, "a file that can be written", f"{error.strerror}") from error
    return ReportFiles(output, output.with_suffix(".md"), tuple(folder / name for name in pictures))


def _fault(output: Path, allowed: str, advice: str) -> ConfigError:
    return ConfigError([Fault("--output", str(output), allowed, advice)])
