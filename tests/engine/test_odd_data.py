"""Datasets as people have them: images of every kind, one image alone, images without boxes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from d2scale.coco.images import read_rgb
from d2scale.engine.config import load_cfg
from d2scale.engine.run import train
from d2scale.errors import ConfigError
from d2scale.launch.launch import Topology
from own_data import RECIPE, OwnData, injection, odd_images

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def run(tmp_path, write_config):
    def run(data, *opts, processes=1):
        path = write_config(RECIPE + injection(data))
        cfg = load_cfg(path, ["OUTPUT_DIR", str(tmp_path / "run"), *map(str, opts)])
        return train(cfg, Topology(processes))

    return run


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60))


@pytest.mark.parametrize("kind", [*odd_images(Image.new("RGB", (2, 2)))])
def test_an_image_is_read_as_it_is_shown(kind, picture, tmp_path):
    other, options = odd_images(picture)[kind]
    other.save(tmp_path / "image", **options)
    read = read_rgb(str(tmp_path / "image")).astype(int)
    expected = np.asarray(picture.convert("L" if other.mode[0] in "LI" else "RGB").convert("RGB"))
    assert read.shape == (60, 90, 3)
    if kind == "black and white":
        assert set(np.unique(read)) == {0, 255}
    else:
        assert abs(read - expected).mean() < 12  # of 255: a palette and JPEG are not exact


def test_all_kinds_train_and_are_evaluated(run, tmp_path):
    data = OwnData(tmp_path / "data", images=10)
    assert len(data.make_odd()) == 10
    opts = ("SOLVER.IMS_PER_BATCH", 9, "DATALOADER.FILTER_EMPTY_ANNOTATIONS", False)
    results = run(data, *opts, "DATALOADER.NUM_WORKERS", 1)
    assert 0 <= results["bbox/AP"] <= 100


def test_the_size_of_a_turned_image_is_that_of_the_image_as_shown(run, tmp_path):
    data = OwnData(tmp_path / "data", images=1)
    data.make_odd()
    (entry,) = data.content["images"]
    entry["width"], entry["height"] = entry["height"], entry["width"]
    data.content["annotations"] = data.content["annotations"][:1]
    data.content["annotations"][0]["bbox"] = [1, 1, 9, 9]
    data.write()
    with pytest.raises(ConfigError, match=r"size of image .*EXIF is .*; correct the annotation"):
        run(data)


@pytest.mark.parametrize("processes", [1, 2])
def test_one_image_alone(run, tmp_path, processes):
    results = run(OwnData(tmp_path / "data", images=1), processes=processes)
    assert 0 <= results["bbox/AP"] <= 100


def test_images_without_annotations_train_if_so_asked(run, tmp_path):
    data = OwnData(tmp_path / "data", images=3)
    kept = data.content["images"][0]["id"]
    data.content["annotations"] = [
        entry for entry in data.content["annotations"] if entry["image_id"] == kept
    ]
    data.write()
    opts = ("DATALOADER.FILTER_EMPTY_ANNOTATIONS", False, "SOLVER.IMS_PER_BATCH", 3)
    assert 0 <= run(data, *opts)["bbox/AP"] <= 100
    assert "training on 3 images" in (tmp_path / "run/log.txt").read_text(encoding="utf-8")


def test_no_annotations_at_all_are_a_line(run, tmp_path):
    data = OwnData(tmp_path / "data", images=2)
    data.content["annotations"] = []
    data.write()
    with pytest.raises(ConfigError, match="allowed: datasets with boxes of their classes"):
        run(data)
