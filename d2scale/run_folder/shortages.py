"""Tell in words what has run out: disk, open files or processes; and log on a full disk."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from d2scale.errors import D2ScaleError

logger = logging.getLogger(__name__)

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_OPEN_FILES = (errno.EMFILE, errno.ENFILE)
_READ_ONLY = errno.EROFS
_PROCESSES = errno.EAGAIN
_SHORTAGES = (*_FULL_DISK, *_OPEN_FILES, _READ_ONLY, _PROCESSES)
# How torch, gloo and Python tell of one in errors without a number.
_IN_WORDS = {
    "can't start new thread": _PROCESSES,
    **{os.strerror(number): number for number in _SHORTAGES},
}
_MOST_FILES = 65536


@contextmanager
def telling_of_shortages(*folders: Path) -> Iterator[None]:
    """Within the context, let an error about something that has run out be one line.

    ``folders`` are written to; an error that names no file is about the fullest of them, or else of
    the working directory and that of temporary files. Other errors pass. Raises D2ScaleError.
    """
    printed = threading.excepthook

    def log(failure: threading.ExceptHookArgs) -> None:
        told = failure.exc_value and shortage(failure.exc_value, folders)
        if told:
            logger.warning("%s", told)
        else:
            printed(failure)

    # TensorBoard writes in a thread, and raises its error again where it is asked to write more.
    threading.excepthook = log
    try:
        yield
    except (OSError, RuntimeError) as error:
        told = shortage(error, folders)
        if told is None:
            raise
        raise D2ScaleError(told) from error
    finally:
        threading.excepthook = printed


def shortage(error: BaseException, folders: Sequence[Path] = ()) -> str | None:
    """Return in one line what has run out, and what to do; None for another error."""
    if "No usable temporary directory" in str(error):
        reason = getattr(error, "strerror", None) or error
        return f"{reason}; make room, or set TMPDIR to a folder that can be written"
    number, name = _number_and_file(error)
    if number is None:
        return None
    reason = os.strerror(number)
    if number in _OPEN_FILES:
        return f"{reason}: {_open_files()}, or lower DATALOADER.NUM_WORKERS"
    if number == _PROCESSES:
        return (
            f"{reason}: no more processes or threads may be started; raise it with ulimit -u, in "
            "a container its limit of pids, or lower DATALOADER.NUM_WORKERS and OMP_NUM_THREADS"
        )
    if name is None:
        # Not tempfile's: that tries to write.
        own = (Path.cwd(), Path(os.environ.get("TMPDIR", "/tmp")))  # noqa: S108
        name = min(folders or own, key=_free_bytes)
    if number == _READ_ONLY:
        return f"{name} cannot be written: {reason}; choose another folder"
    advice = "make room; a training goes on with --resume"
    return f"{name} cannot be written: {reason}{free_space(name)}; {advice}"


def free_space(path: str | Path) -> str:
    """Return ", N free on its disk" for a path that may not be there; empty where not known."""
    with suppress(OSError, StopIteration):
        found = next(folder for folder in Path(path).absolute().parents if folder.exists())
        if hasattr(os, "statvfs") and not os.statvfs(found).f_favail and os.statvfs(found).f_files:
            return ", no file more may be made on its disk"
        return f", {_free_bytes(found) / 2**20:.1f} MiB free on its disk"
    return ""


def let_log_calmly(name: str) -> None:
    """Let all handlers of the logger of this name be as :func:`log_calmly` makes them."""
    for handler in logging.getLogger(name).handlers:
        log_calmly(handler)


def log_calmly(handler: logging.Handler) -> logging.Handler:
    """Let a handler that cannot write say so once, without a traceback for every line.

    The training goes on: whatever it cannot do without tells by itself. Returns the handler.
    """
    told = False

    def handle_error(record: logging.LogRecord) -> None:
        nonlocal told
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            logging.Handler.handleError(handler, record)
        elif not told:
            told = True
            name = getattr(getattr(handler, "stream", None), "name", "the log")
            room = free_space(name) if error.errno in _FULL_DISK else ""
            with suppress(OSError):
                sys.stderr.write(
                    f"d2scale: warning: {name} cannot be written: {error.strerror}{room}; "
                    "its lines may be lost\n"
                )

    handler.handleError = handle_error  # type: ignore[method-assign]
    return handler


def _number_and_file(error: BaseException) -> tuple[int | None, str | Path | None]:
    """Return the system's number of a shortage, None for another error, and a file's name."""
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        # torch's zip writer says "unexpected pos" about a full disk, after what the system said.
        error = error.__context__
    if isinstance(error, OSError) and error.errno in _SHORTAGES:
        # A full pipe that must not block has the same number; Python adds these words.
        if error.errno == _PROCESSES and "without blocking" in str(error):
            return None, None
        return error.errno, error.filename if isinstance(error.filename, str) else None
    if isinstance(error, RuntimeError):
        for words, number in _IN_WORDS.items():
            if words in str(error):
                return number, None
    return None, None


def _open_files() -> str:
    with suppress(ImportError):
        import resource

        limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        raised = _MOST_FILES if most < 0 else min(most, _MOST_FILES)
        if 0 <= limit < raised:
            return f"a process may have {limit}; raise it with ulimit -n {raised}"
    return "raise the limit of open files"


def _free_bytes(folder: Path) -> int:
    with suppress(OSError):
        return shutil.disk_usage(folder).free
    return sys.maxsize
