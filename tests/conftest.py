"""What several test files share."""

import gc
import logging
import os
from pathlib import Path

import pytest

from coco_folder import CocoFolder

# As it was before any test changed it.
REAL_ROOT = Path(os.environ.get("DETECTRON2_DATASETS", "datasets"))
REPOSITORY = Path(__file__).resolve().parents[1]
RECIPES = REPOSITORY / "projects" / "MetaFCOS" / "configs"


@pytest.fixture(scope="module", autouse=True)
def _imports_are_no_garbage():
    """Leave what exists out of garbage collection; torch's objects make each take 0.2 s."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _logs_are_seen():
    """Undo what a benchmark that is called in this process has switched off."""
    yield
    logging.disable(logging.NOTSET)


def pytest_unconfigure():
    """Let libraries find nothing of theirs alive at the end, of which some complain."""
    gc.unfreeze()


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


@pytest.fixture(scope="module")
def one_thread():
    """Train on one thread, here and in processes to come: faster for tiny layers, and bit-equal."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def warm_ranks():
    """Start ranks as forks of a process that has imported torch, which takes a new one seconds."""
    import warm_processes

    with warm_processes.warm_ranks():
        yield


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
