"""Names of the files in a run's folder, atomic writing, and checks of a folder."""

from __future__ import annotations

import errno
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pickle import UnpicklingError
from typing import IO, Any

from d2scale.errors import ConfigError, Fault, one_line
from d2scale.run_folder.shortages import free_space

CONFIG_FILE = "config.yaml"
PLAN_FILE = "plan.json"
METRICS_FILE = "metrics.json"
MACHINE_FILE = "machine.json"
LOG_FILE = "log.txt"  # of rank 0; that of rank 1 is log.txt.rank1
LOCK_FILE = ".lock"
LAST_CHECKPOINT = "last_checkpoint"  # holds the file name of the last checkpoint
FINAL_CHECKPOINT = "model_final.pth"
CHECKPOINTS = "model_*.pth"
INFERENCE_FOLDER = "inference"
RESULTS_FILE = "coco_instances_results.json"  # in INFERENCE_FOLDER

WRITABLE_FOLDER = "a folder that can be written"

# Text (written as UTF-8), bytes, or a function that writes to the open file.
Content = str | bytes | Callable[[IO[bytes]], Any]
ErrorOf = Callable[[str], ConfigError]


def write_atomically(path: str | Path, content: Content, error_of: ErrorOf | None = None) -> None:
    """Write a file so that a failure or a kill leaves the old file, or none, but never a part.

    The content goes to a temporary file beside it, is flushed to the disk and then renamed.
    A symbolic link is followed. A device or pipe, and the file that standard output goes to,
    cannot be renamed over: they are written directly.

    ConfigError, made by ``error_of`` from the reason, if it cannot be written; its folder must
    exist.
    """
    path = Path(path)
    try:
        if stream := _open_in_place(path):
            with stream:
                _write(stream, content)
        else:
            _replace(Path(os.path.realpath(path)), content)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        reason = reason_of(error)
        if reason == os.strerror(errno.ENOSPC):
            reason += free_space(path)
        if error_of is not None:
            raise error_of(reason) from error
        fault = Fault("file", str(path), "a file that can be written", f"check it: {reason}")
        raise ConfigError([fault]) from error


def reason_of(error: Exception) -> str:
    """Return one line that says what the system had against a file."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        # torch's zip writer says "unexpected pos" about a full disk, after what the system said.
        error = error.__context__
    return getattr(error, "strerror", None) or str(error).partition("\n")[0]


def why_unreadable(error: Exception) -> str:
    """Return one line about a file that torch does not load, without torch's advice to trust it."""
    text = str(error).strip()
    if isinstance(error, UnpicklingError) or "weights_only" in text:
        # Such as: Unsupported global: GLOBAL os.system was not an allowed global by default.
        asked = re.search(r"GLOBAL (\S+) was not|Unsupported (?:class|type) (\S+)", text)
        name = asked and (asked[1] or asked[2])
        return f"it asks for {name}, which is not run" if name else "it holds no plain tensors"
    return one_line(error)


def _open_in_place(path: Path) -> IO[bytes] | None:
    """Open what must not be replaced by a rename; None for a regular file or a new one."""
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return None
    for descriptor in (1, 2):
        # For -o /dev/stdout > FILE. A duplicate keeps the position in that file.
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return os.fdopen(os.dup(descriptor), "wb")
    return None if stat.S_ISREG(status.st_mode) else open(path, "wb")


def _replace(path: Path, content: Content) -> None:
    # A name of its own: several ranks may write the same file at the same time.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with open(partial, "xb") as file:
            _write(file, content)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):
            shutil.copymode(path, partial)
        partial.replace(path)
    except BaseException:
        with suppress(OSError):
            partial.unlink()
        raise
    with suppress(OSError):  # flush the rename to the disk, where the system can
        handle = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _write(file: IO[bytes], content: Content) -> None:
    if callable(content):
        content(file)
    else:
        file.write(content.encode() if isinstance(content, str) else content)


def remove_partial_checkpoints(folder: Path) -> None:
    """Remove what a killed run has left of checkpoints that it was writing."""
    for path in folder.glob(f".{CHECKPOINTS}.*.partial"):
        with suppress(OSError):
            path.unlink()


def folder_faults(
    folder: Path, *, key: str = "OUTPUT_DIR", allowed: str = WRITABLE_FOLDER
) -> list[Fault]:
    """Return why files cannot be written in ``folder``, which need not exist. Writes nothing."""
    try:
        with suppress(FileNotFoundError, NotADirectoryError):
            os.stat(folder)  # refuses a name that is too long or holds a NUL
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    except (OSError, ValueError) as error:
        return [folder_fault(folder, reason_of(error), key=key, allowed=allowed)]
    if existing.is_dir() and os.access(existing, os.W_OK | os.X_OK):
        return []
    reason = "cannot be written to" if existing.is_dir() else "is a file"
    return [folder_fault(folder, f"{existing} {reason}", key=key, allowed=allowed)]


def folder_fault(
    folder: Path, reason: str, *, key: str = "OUTPUT_DIR", allowed: str = WRITABLE_FOLDER
) -> Fault:
    """Return the fault of the config key or option that names a folder that cannot be used."""
    return Fault(key, str(folder), allowed, f"choose another ({reason})")


def make_folder(folder: Path, *, key: str = "OUTPUT_DIR", allowed: str = WRITABLE_FOLDER) -> None:
    """Make a folder and its parents, if it is not there; ConfigError if the system refuses."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        fault = folder_fault(folder, reason_of(error), key=key, allowed=allowed)
        raise ConfigError([fault]) from error
