"""What several test files share."""

import os
from pathlib import Path

import pytest

from coco_folder import CocoFolder

# As it was before any test changed it.
REAL_ROOT = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "projects" / "MetaFCOS" / "configs"


@pytest.fixture
def recipes() -> Path:
    """The folder of the MetaFCOS recipes."""
    return RECIPES


@pytest.fixture
def write_config(tmp_path):
    """Write a config file and return its path as text."""

    def write(text: str, name: str = "recipe.yaml") -> str:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return str(path)

    return write


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A faultless train2017 in a temporary DETECTRON2_DATASETS."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return CocoFolder(tmp_path)


@pytest.fixture
def coco_val(coco):
    """A val2017 next to it."""
    return CocoFolder(coco.root, "val")


@pytest.fixture
def real_coco():
    """The folder of a real COCO, or of a part of it."""
    if not (REAL_ROOT / "coco/annotations/instances_train2017.json").is_file():
        pytest.skip("needs COCO: set DETECTRON2_DATASETS to the folder that holds coco/")
    return REAL_ROOT
