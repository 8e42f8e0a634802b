"""The folder of a reproduction: whose it is, and with which settings it was begun."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import IO, Any

from d2scale.engine.checkpoint.files import write_atomically
from d2scale.errors import ConfigError, Fault

RECORD = "reproduction.json"
_FORMAT = 1


def folder_faults(folder: Path, settings: Mapping[str, Any], *, begun: bool) -> list[Fault]:
    """Return why a reproduction with ``settings`` may not use ``folder``. Nothing is written.

    Args:
        folder: need not exist.
        settings: by the option that chooses them, plain values.
        begun: whether an experiment in it has been; only then do its settings bind.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        return [_fault(folder, f"{existing} is a file")]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [_fault(folder, f"{existing} cannot be written to")]
    if not folder.exists() or not any(folder.iterdir()):
        return []
    record = _read(folder)
    if record is None:
        return [_fault(folder, "it holds other files")]
    before = record["settings"] if begun else {}
    return [
        Fault(
            option,
            value,
            f"{before[option]!r}, as {folder} was begun with",
            "repeat that, or choose another --output-dir",
        )
        for option, value in settings.items()
        if option in before and before[option] != value
    ]


def _fault(folder: Path, reason: str) -> Fault:
    allowed = "a new or empty folder, or one of d2scale reproduce"
    return Fault("--output-dir", str(folder), allowed, f"choose one ({reason})")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(record, dict) and isinstance(record.get("settings"), dict)
    return record if known and record.get("format") == _FORMAT else None


def claim(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, and record the settings in it.

    Raises:
        ConfigError: if the system refuses.
    """
    text = json.dumps({"format": _FORMAT, "settings": dict(settings)}, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError([_fault(folder, str(error.strerror))]) from error
    write_atomically(folder / RECORD, partial(_write, content=text.encode()))


def _write(file: IO[bytes], content: bytes) -> None:
    file.write(content)
