"""The lock that keeps a folder to one run; it ends with the process that holds it."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import LOCK_FILE, folder_fault, reason_of, remove_partial_checkpoints
from d2scale.run_folder.shortages import free_space

logger = logging.getLogger(__name__)

# Device and inode of the lock files that this process holds. The system would grant it a second
# lock, and drop both as soon as the file is closed once.
_HELD: set[tuple[int, int]] = set()
_HELD_GUARD = threading.Lock()


@contextmanager
def run_lock(folder: Path, *, key: str = "OUTPUT_DIR") -> Iterator[None]:
    """Within the context, no other run may write to ``folder``; ConfigError if one already does.

    The system releases the lock when the process ends, even by a kill. On a file system
    without locks, as some network file systems are, the run goes on unlocked.
    """
    path = folder / LOCK_FILE
    with _HELD_GUARD:
        # Opened for both: some network file systems want that for an exclusive lock.
        file = _open_and_lock(path, "a+", key)
        identity = _identity(path)
        _HELD.add(identity)
    try:
        _write_holder(file, key)
        remove_partial_checkpoints(folder)
        yield
    finally:
        with _HELD_GUARD:
            _HELD.discard(identity)
            file.close()


def _write_holder(file: IO[str], key: str) -> None:
    try:
        file.truncate(0)
        # Past Python's buffer: what a full disk refuses would be written again by close().
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        folder = Path(file.name).parent
        reason = f"{reason_of(error)}{free_space(file.name)}"
        raise ConfigError([folder_fault(folder, reason, key=key)]) from error


def refuse_locked(folder: Path, *, key: str = "OUTPUT_DIR") -> None:
    """Raise a ConfigError if another run is writing to ``folder``. Writes nothing."""
    path = folder / LOCK_FILE
    with _HELD_GUARD:
        if path.exists():
            _open_and_lock(path, "r+", key).close()


def _open_and_lock(path: Path, mode: str, key: str) -> IO[str]:
    if path.exists() and _identity(path) in _HELD:
        # Not even opened: closing it again would drop the lock.
        raise _locked(path.parent, key, "this process")
    try:
        file: IO[str] = open(path, mode, encoding="utf-8")  # noqa: SIM115  the caller closes it
    except OSError as error:
        raise ConfigError([folder_fault(path.parent, reason_of(error), key=key)]) from error
    try:
        import fcntl

        # A POSIX lock, not flock: a forked loader worker that outlives a killed run must not keep
        # the lock.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except ImportError:  # Windows
        pass
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise _locked(path.parent, key, lock_holder(path.parent) or "not known") from error
    except OSError as error:
        logger.warning("%s cannot be locked: %s", path.parent, error.strerror)
    return file


def lock_holder(folder: Path) -> str:
    """Return which process has locked ``folder`` last; empty without one."""
    try:
        return (folder / LOCK_FILE).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _locked(folder: Path, key: str, holder: str) -> ConfigError:
    allowed = "a folder that no other run is writing to"
    advice = f"wait until that run has ended ({holder}), or choose another folder"
    return ConfigError([Fault(key, str(folder), allowed, advice)])
