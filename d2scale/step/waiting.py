"""Note when this process waits for other ranks, for a thread that watches over it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Wait(NamedTuple):
    """An exchange with the other ranks that this process takes part in now."""

    number: int  # of the exchange, from 1; the same on every rank
    since: float  # a value of ``time.monotonic()``


_number = 0
_since: float | None = None


@contextmanager
def exchange() -> Iterator[None]:
    """Within the context this process may wait for the other ranks, which all enter it too."""
    global _number, _since
    _number, _since = _number + 1, time.monotonic()
    try:
        yield
    finally:
        _since = None


def present_wait() -> Wait | None:
    """Return the exchange that this process is in; None while it computes."""
    since = _since
    return None if since is None else Wait(_number, since)
