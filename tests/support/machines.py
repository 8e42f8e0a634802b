"""Network namespaces as the machines of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import namespaces
import pytest

SUPPORT = Path(__file__).parent


@contextmanager
def cluster(size: int) -> Iterator[list[namespaces.Machine]]:
    """Machines on one bridge; the test is skipped where namespaces are not permitted."""
    with ExitStack() as stack:
        try:
            machines = stack.enter_context(namespaces.cluster(size, PYTHONPATH=str(SUPPORT)))
        except OSError as error:
            pytest.skip(f"network namespaces are not permitted here: {error}")
        yield machines
