"""Processes that end with the one that has started them, however that ends."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

_PARENT_SECONDS = 1.0  # between two looks at the parent process


def end_with_parent(parent: int, _: int = 0) -> None:
    """Let this process end when the process ``parent`` does (torch's ``worker_init_fn``).

    torch's own watch asks for the parent's number when the worker is ready. A parent that has died
    by then is never missed, and the worker lives on, holding its output open.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def begin_worker(parent: int, init: Callable[[int], object] | None, worker: int) -> None:
    """Let a loader's worker end with its parent; then do what its ``init`` does."""
    end_with_parent(parent)
    if init is not None:
        init(worker)
