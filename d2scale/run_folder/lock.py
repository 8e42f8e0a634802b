"""One run to a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from d2scale.errors import ConfigError, Fault

logger = logging.getLogger(__name__)

LOCK_FILE = ".lock"


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Within the context, no other run may write to ``folder``, which must exist.

    The system releases the lock when the process dies, in whatever way. Where it has no such
    locks, as on some network file systems, the run goes on without.

    Raises:
        ConfigError: if another run holds it.
    """
    # Opened for both: some network file systems want that for an exclusive lock.
    with open(folder / LOCK_FILE, "a+", encoding="utf-8") as file:
        _take(file, folder)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def refuse_locked(folder: Path) -> None:
    """Raise if another run is writing to ``folder``; nothing is written.

    Raises:
        ConfigError: if so.
    """
    with suppress(OSError), open(folder / LOCK_FILE, "r+", encoding="utf-8") as file:
        _take(file, folder)


def _take(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        # A POSIX lock: it is the process's alone, so a loader's worker that outlives a killed
        # run does not hold it.
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        raise ConfigError([_fault(folder, file.read().strip())]) from error
    except OSError as error:
        logger.warning("%s cannot be locked: %s", folder, error.strerror)


def _fault(folder: Path, holder: str) -> Fault:
    return Fault(
        "OUTPUT_DIR",
        str(folder),
        "a folder that no other run is writing to",
        f"wait until that run has ended ({holder or 'not known'}), or choose another folder",
    )
