"""Where a run's log lines go: ``log.txt`` in its folder, and the terminal of the first rank."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from d2scale.config.projects import entry_points
from d2scale.run_folder.files import LOG_FILE

# Lines of this logger repeat what a progress bar shows.
METRICS_LOGGER = "d2scale.metrics"
_FORMAT = "[%(asctime)s] %(name)s %(levelname)s: %(message)s"
_DATE_FORMAT = "%m/%d %H:%M:%S"


class _TerminalHandler(logging.Handler):
    """Writes above a progress bar instead of into it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stdout)
        except Exception:
            self.handleError(record)


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
    handlers: list[logging.Handler] = [logging.FileHandler(folder / file_name, encoding="utf-8")]
    if rank == 0:
        handlers.append(_console_handler())
    root = logging.getLogger()
    chatty = [logging.getLogger(name) for name in _chatty_packages()]
    levels = [each.level for each in chatty]
    for handler in handlers:
        handler.setFormatter(logging.Formatter(_FORMAT, _DATE_FORMAT))
        root.addHandler(handler)
    for each in chatty:
        each.setLevel(logging.INFO)
    try:
        yield
    finally:
        for each, level in zip(chatty, levels, strict=True):
            each.setLevel(level)
        for handler in handlers:
            root.removeHandler(handler)
            handler.close()


def _chatty_packages() -> set[str]:
    """Return the packages whose INFO lines belong to a run; of all others only warnings do."""
    models = entry_points(group="d2scale.models")
    return {"d2scale", *(entry.module.partition(".")[0] for entry in models)}


def _console_handler() -> logging.Handler:
    if not on_terminal():
        return logging.StreamHandler(sys.stdout)
    handler = _TerminalHandler()
    handler.addFilter(lambda record: record.name != METRICS_LOGGER)
    return handler
