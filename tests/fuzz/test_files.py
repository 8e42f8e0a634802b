"""Any annotation file, memory profile or run folder is used or refused; nothing else is raised."""

from __future__ import annotations

import json

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from coco_folder import CocoFolder
from d2scale.coco.dataset import check_datasets, load_training_dataset
from d2scale.config import load_cfg
from d2scale.planning.memory_profile import MemoryProfile, Phase, Point, load_profiles
from d2scale.report import curves
from d2scale.report.page import to_markdown
from d2scale.report.write import make_document, read_runs
from run_folders import step_lines
from wrong_values import VALUES, cases, may_be_refused, wrong_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three training and three test images."""
    root = tmp_path_factory.mktemp("coco")
    CocoFolder(root, "val")
    return CocoFolder(root)


@pytest.fixture
def datasets(folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.root))
    return load_cfg("d2scale://MetaFCOS/small-cpu.yaml", ["DATASETS.TEST", "()"])


def _annotations():
    entries = {"id": 1, "image_id": 1, "category_id": 8, "bbox": [5, 5, 10, 20], "iscrowd": 0}
    image = {"id": 1, "file_name": "1.png", "width": 60, "height": 40}
    return {
        "images": [image],
        "annotations": [{**entries, "area": 200, "segmentation": [[1, 2, 3, 4, 5, 6]]}],
        "categories": [{"id": 8, "name": "truck"}],
    }


@cases(100)
@given(content=wrong_in(_annotations()) | VALUES)
def test_any_annotation_file_is_read_or_refused(content, folder, datasets):
    folder.json_file.write_text(json.dumps(content))
    with may_be_refused():
        check_datasets(datasets, eval_only=False)
        load_training_dataset(datasets)


PROFILE = MemoryProfile(
    (Phase("backward", 10, 5),), "measured", covers={"x": 1}, points=(Point(1, 2, 3),)
).to_json()


@cases(60)
@given(content=wrong_in(PROFILE) | VALUES, images=st.integers(0, 100))
def test_any_profile_is_read_or_refused(content, images, tmp_path):
    (tmp_path / "profile.json").write_text(json.dumps(content))
    with may_be_refused():
        for profile in load_profiles(str(tmp_path / "profile.json")):
            profile.peak_bytes(images, world_size=2, accumulates=True)
            profile.largest_ims_per_gpu(2**34)


LOG = """\
Rank of current process: 0. World size: 2
eta: 1:00:00  iter: 19  total_loss: 2  max_mem: 7000M
Overall training speed: 98 iterations in 1:05:49 (1.3317 s / it)
Total training time: 11:17:36 (0:11:47 on hooks)
|  AP   |  AP50  |
|:-----:|:------:|
| 1.000 | 2.000  |
"""
RUN = {
    "config.yaml": {"SOLVER": {"IMS_PER_BATCH": 8, "MAX_ITER": 20}, "DATASETS": {"TEST": ["x"]}},
    "plan.json": {
        "method": "keep_total",
        "world_size": 2,
        "ims_per_gpu": 4,
        "changes": {"K": [1, 2]},
    },
    "machine.json": {"devices": ["one"], "torch": "2.15", "packages": {"torch": "2"}},
    "metrics.json": step_lines(6),
}


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    # Curves are laid out, and not painted, which takes most of the time.
    monkeypatch.setattr(curves, "_to_png", lambda figure: b"")
    return tmp_path / "run"


@cases(6)
@given(content=wrong_in(RUN), log=st.text(max_size=40), place=st.integers(0, len(LOG)))
def test_any_run_folder_is_reported_or_refused(content, log, place, run_folder):
    run_folder.mkdir(exist_ok=True)
    for name, value in content.items():
        text = yaml.safe_dump(value) if name == "config.yaml" else json.dumps(value)
        if name == "metrics.json" and isinstance(value, list):
            text = "".join(json.dumps(line) + "\n" for line in value)
        (run_folder / name).write_text(text, encoding="utf-8")
    text = LOG[:place] + log + LOG[place:]
    (run_folder / "log.txt").write_bytes(text.encode("utf-8", "surrogatepass"))
    with may_be_refused():
        runs, notes = read_runs([run_folder])
        to_markdown(make_document(runs, (), notes), "pictures")
