"""These tests run on the real detectron2, where it is installed."""

import importlib.util

import pytest

from upstream_tests import mark

REASON = "needs detectron2, which is not on the package index"
AVAILABLE = importlib.util.find_spec("detectron2") is not None


def pytest_collection_modifyitems(items):
    mark(items, "/tests/detectron2/", pytest.mark.detectron2, "" if AVAILABLE else REASON)


@pytest.fixture
def dataset(tmp_path):
    """The name of a registered dataset with masks, keypoints and maps of classes."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2_memory import register_dataset

    name = f"memory_{tmp_path.name}"
    register_dataset(name, tmp_path)
    yield name
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)
