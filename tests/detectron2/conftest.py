"""These tests run on the real detectron2, where it is installed."""

import importlib.util

import pytest

REASON = "needs detectron2, which is not on the package index"
AVAILABLE = importlib.util.find_spec("detectron2") is not None


def pytest_collection_modifyitems(items):
    for item in items:
        if "/tests/detectron2/" in item.path.as_posix():
            item.add_marker(pytest.mark.detectron2)
            # Upstream warns of its own old calls; none of that is d2scale's.
            item.add_marker(pytest.mark.filterwarnings("default"))
            if not AVAILABLE:
                item.add_marker(pytest.mark.skip(reason=REASON))
