"""The folder of a reproduction, and the settings that it was begun with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder import files
from d2scale.run_folder.contents import read_json, write_json

RECORD = "reproduction.json"
_FORMAT = 1
_OPTION = "--output-dir"
_ALLOWED = "a new or empty folder, or one of d2scale reproduce"


def folder_faults(folder: Path, settings: Mapping[str, Any], *, begun: bool) -> list[Fault]:
    """Return why a reproduction with these options may not use ``folder``. Writes nothing."""
    if faults := files.folder_faults(folder, key=_OPTION, allowed=_ALLOWED):
        return faults
    if not folder.exists() or not any(folder.iterdir()):
        return []
    record = _read(folder)
    if record is None:
        return [files.folder_fault(folder, "it holds other files", key=_OPTION, allowed=_ALLOWED)]
    # The settings bind only once an experiment has begun.
    before = record["settings"] if begun else {}
    advice = "repeat that, or choose another --output-dir"
    return [
        Fault(option, value, f"{before[option]!r}, as {folder} was begun with", advice)
        for option, value in settings.items()
        if option in before and before[option] != value
    ]


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = read_json(folder / RECORD)
    except ConfigError:
        return None
    known = record.get("format") == _FORMAT and isinstance(record.get("settings"), dict)
    return record if known else None


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, and record the settings in it; ConfigError if the system refuses."""
    files.make_folder(folder, key=_OPTION, allowed=_ALLOWED)
    write_json(folder / RECORD, {"format": _FORMAT, "settings": dict(settings)})
