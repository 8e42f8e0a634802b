"""Tests that need packages which are not on the package index."""

import pytest


def mark(items, folder: str, marker, reason: str = "") -> None:
    """Mark the tests of ``folder``; with a ``reason`` they are skipped."""
    for item in items:
        if folder in item.path.as_posix():
            item.add_marker(marker)
            # Upstream warns of its own old calls; none of that is d2scale's.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))
