"""These tests run on the real detectron2, d2go and mobile-vision, where they are installed."""

import importlib.util
import os
import sys

import pytest

from d2go_commands import D2Go
from d2scale.coco.shapes import write_shapes_dataset
from upstream_tests import mark

REASON = (
    "needs detectron2, d2go and mobile-vision, which are not on the package index: "
    "see 'With d2go' in README.md"
)
AVAILABLE = all(importlib.util.find_spec(name) for name in ("detectron2", "d2go", "mobile_cv"))


def pytest_collection_modifyitems(items):
    mark(items, "/d2go/", pytest.mark.d2go, "" if AVAILABLE else REASON)


@pytest.fixture(scope="session", autouse=True)
def import_upstream():
    """Import d2go with a real standard input: mobile-vision asks for its file number."""
    if not AVAILABLE:
        return
    captured = sys.stdin
    with open(os.devnull, encoding="utf-8") as sys.stdin:
        try:
            from d2scale.d2go.environment import setup_environment

            setup_environment()
            import d2go.runner  # noqa: F401
        finally:
            sys.stdin = captured


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """DETECTRON2_DATASETS with 8 training images."""
    root = tmp_path_factory.mktemp("datasets")
    return write_shapes_dataset(root, train_images=8, val_images=2, seed=0)


@pytest.fixture
def d2go(tmp_path, datasets):
    """Runs d2go's commands in ``tmp_path``."""
    return D2Go(tmp_path, datasets)
