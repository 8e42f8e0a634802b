"""Log a run to ``log.txt`` in its folder, and on the first rank to the terminal."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tqdm.contrib.logging import logging_redirect_tqdm

from d2scale.config.projects import entry_points
from d2scale.errors import printable
from d2scale.run_folder.files import LOG_FILE
from d2scale.run_folder.shortages import log_calmly

# Lines of this logger repeat what a progress bar shows.
METRICS_LOGGER = "d2scale.metrics"


class _Formatter(logging.Formatter):
    """Writes what names of files and classes hold so that no terminal obeys it."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record), keep="\n\t")


_FORMAT = _Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S")


def on_terminal() -> bool:
    """Return whether somebody is watching, so that a progress bar makes sense."""
    return sys.stdout.isatty() and sys.stderr.isatty()


@contextmanager
def logging_to(folder: Path, rank: int) -> Iterator[None]:
    """Within the context, log to ``folder``, and on rank 0 to standard output as well.

    The first rank writes ``log.txt``, the others ``log.txt.rank1`` and so on, as detectron2
    names them. An existing file is continued.
    """
    file_name = LOG_FILE if rank == 0 else f"{LOG_FILE}.rank{rank}"
    file = logging.FileHandler(folder / file_name, encoding="utf-8")
    with ExitStack() as stack:
        stack.callback(_close, file)
        _add_handler(stack, logging.getLogger(), file)
        for name in _chatty_packages():
            package = logging.getLogger(name)
            stack.callback(package.setLevel, package.level)
            package.setLevel(logging.INFO)
        if rank == 0:
            _add_handler(stack, logging.getLogger(), logging.StreamHandler(sys.stdout))
            if on_terminal():
                # Write above a progress bar instead of into it, and do not repeat what it shows.
                stack.enter_context(logging_redirect_tqdm())
                metrics = logging.getLogger(METRICS_LOGGER)
                _add_handler(stack, metrics, file)
                stack.callback(setattr, metrics, "propagate", True)
                metrics.propagate = False
        yield


def _close(file: logging.FileHandler) -> None:
    # What a full disk has refused is tried once more here, and has been told.
    with suppress(OSError):
        file.close()


def _add_handler(stack: ExitStack, logger: logging.Logger, handler: logging.Handler) -> None:
    handler.setFormatter(_FORMAT)
    logger.addHandler(log_calmly(handler))
    stack.callback(logger.removeHandler, handler)


def _chatty_packages() -> set[str]:
    """Return the packages whose INFO lines belong to a run; of all others only warnings do."""
    models = entry_points(group="d2scale.models")
    return {"d2scale", *(entry.module.partition(".")[0] for entry in models)}
