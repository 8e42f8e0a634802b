"""Writing a report's files: all of them, or none."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import folder_faults, reason_of

# Marks a folder of pictures as written here, so that it may be replaced.
_MARKER = ".made-by-d2scale-report"


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report."""

    html: Path
    markdown: Path
    pictures: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # what was skipped, missing or computed


def picture_folder(output: Path) -> Path:
    """Return the folder of the pictures of the page ``output``."""
    return output.with_name(f"{output.stem}_files")


def check_output(output: Path) -> None:
    """Raise a :class:`ConfigError` for a page that cannot be written, before any work is done."""
    folder = picture_folder(output)
    if output.suffix != ".html":
        raise _fault(output, "a file that ends in .html", "name it so")
    for file in (output, output.with_suffix(".md")):
        if file.is_dir():
            raise _fault(output, "a file", f"{file} is a folder; choose another name")
    if folder.exists() and not (folder / _MARKER).is_file():
        advice = f"choose another name ({folder} is needed for pictures, and holds other files)"
        raise _fault(output, "a report with a folder of its own", advice)
    if faults := folder_faults(output.parent, key="--output"):
        raise ConfigError(faults)


def write_files(
    output: Path, html: str, markdown: str, pictures: Mapping[str, bytes]
) -> ReportFiles:
    """Write a page, its Markdown and pictures; a ConfigError leaves an older report whole."""
    check_output(output)
    folder, text = picture_folder(output), output.with_suffix(".md")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".report-") as scratch:
            new = Path(scratch, "new")
            (new / folder.name).mkdir(parents=True)
            (new / folder.name / _MARKER).touch()
            for name, content in pictures.items():
                (new / folder.name / name).write_bytes(content)
            (new / text.name).write_text(markdown, encoding="utf-8")
            (new / output.name).write_text(html, encoding="utf-8")
            _move_into_place(new, (folder, text, output), old=Path(scratch))
    except OSError as error:
        raise _fault(output, "a file that can be written", reason_of(error)) from error
    return ReportFiles(output, text, tuple(folder / name for name in pictures))


def _move_into_place(new: Path, targets: Sequence[Path], old: Path) -> None:
    """Replace the targets by what has their names in ``new``; on a failure undo all of it."""
    try:
        for target in targets:
            if target.exists():
                os.replace(target, old / target.name)
            os.replace(new / target.name, target)
    except BaseException:
        for target in targets:
            if not (new / target.name).exists():
                os.replace(target, new / target.name)
            if (old / target.name).exists():
                os.replace(old / target.name, target)
        raise


def _fault(output: Path, allowed: str, advice: str) -> ConfigError:
    return ConfigError([Fault("--output", str(output), allowed, advice)])
