from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from d2scale.coco.classes import BASE_CATEGORY_IDS, COCO_CLASSES
from d2scale.coco.dataset import check_datasets, load_dataset, load_training_dataset
from d2scale.coco.shapes import KINDS, MARKER, write_shapes_dataset
from d2scale.config.defaults import get_cfg
from d2scale.errors import DataError


def write(root, **changes):
    settings = {"train_images": 40, "val_images": 12, "seed": 3, "image_size": (48, 96), **changes}
    return write_shapes_dataset(root, **settings)


def files_of(root):
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(Path(root).rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    return write(tmp_path_factory.mktemp("shapes"))


def content_of(root, part="train"):
    return json.loads((root / f"coco/annotations/instances_{part}2017.json").read_text())


def test_layout_and_categories_are_cocos(shapes):
    for part, count in (("train", 40), ("val", 12)):
        content = content_of(shapes, part)
        assert {c["id"]: c["name"] for c in content["categories"]} == COCO_CLASSES
        names = sorted(path.name for path in (shapes / f"coco/{part}2017").iterdir())
        assert names == [image["file_name"] for image in content["images"]]
        assert len(names) == count
    assert {kind.category_id for kind in KINDS} <= set(BASE_CATEGORY_IDS)


def test_it_loads_without_a_fault(shapes, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes))
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = ("coco_pretrain_train_base",)
    cfg.DATASETS.TEST = ("coco_pretrain_val_base",)
    check_datasets(cfg)
    everything = load_dataset("coco_pretrain_train_base")
    assert len(everything) == 40
    # Every tenth image is empty.
    assert len(load_training_dataset(cfg)) == 36
    present = {everything.category_ids[c] for c in everything.records.classes}
    assert present == {kind.category_id for kind in KINDS}


def test_it_has_crowds_and_several_shapes_of_picture(shapes):
    content = content_of(shapes)
    assert sum(a["iscrowd"] for a in content["annotations"]) == 4
    ratios = [image["width"] / image["height"] for image in content["images"]]
    assert min(ratios) < 0.8
    assert max(ratios) > 1.25
    for image in content["images"]:
        assert min(image["width"], image["height"]) >= 48
        assert max(image["width"], image["height"]) <= 96
        with Image.open(shapes / "coco/train2017" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])


def test_boxes_enclose_what_was_drawn(tmp_path):
    """In the middle of a box lies the colour of its kind."""
    root = write(tmp_path, image_size=(160, 200))
    content = content_of(root)
    colours = {kind.category_id: np.array(kind.colour) for kind in KINDS if not kind.hole}
    images = {image["id"]: image for image in content["images"]}
    checked = 0
    for annotation in content["annotations"]:
        if annotation["iscrowd"] or annotation["category_id"] not in colours:
            continue
        image = images[annotation["image_id"]]
        with Image.open(root / "coco/train2017" / image["file_name"]) as picture:
            pixels = np.asarray(picture).astype(int)
        x, y, width, height = annotation["bbox"]
        middle = pixels[int(y + height / 2), int(x + width / 2)]
        assert np.abs(middle - colours[annotation["category_id"]]).max() < 45
        checked += 1
    assert checked > 30


def test_the_same_arguments_give_the_same_files(shapes, tmp_path):
    assert files_of(write(tmp_path / "again")) == files_of(shapes)
    other = files_of(write(tmp_path / "other", seed=4))
    assert other.keys() == files_of(shapes).keys()
    name = "coco/train2017/000000000001.jpg"
    assert other[name] != files_of(shapes)[name]
    assert other[name] != other["coco/val2017/000000000001.jpg"]


def test_a_second_call_writes_only_what_changed(tmp_path):
    root = write(tmp_path)
    path = root / "coco/train2017/000000000001.jpg"
    path.touch()
    os.utime(path, (1, 1))
    write(tmp_path)
    assert path.stat().st_mtime == 1
    write(tmp_path, train_images=5)
    assert len(list((root / "coco/train2017").iterdir())) == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["coco"]


@pytest.mark.parametrize("name", ["annotations/instances_train2017.json", "coco", "."])
def test_other_peoples_files_are_left_alone(tmp_path, name):
    path = tmp_path / "coco" / name
    if name == ".":
        (tmp_path / "coco").write_text("a file")
    else:
        path.parent.mkdir(parents=True)
        path.write_text("precious")
    before = files_of(tmp_path)
    with pytest.raises(DataError, match=r"folder is '.*coco'; allowed: a folder that is empty"):
        write(tmp_path)
    assert files_of(tmp_path) == before


def test_an_empty_folder_is_filled(tmp_path):
    (tmp_path / "coco").mkdir()
    write(tmp_path)
    assert (tmp_path / "coco" / MARKER).is_file()


def test_nothing_is_left_of_a_failed_call(tmp_path, monkeypatch):
    write(tmp_path)
    before = files_of(tmp_path)
    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(DataError, match="a writable folder; choose another folder"):
        write(tmp_path, seed=5)
    assert files_of(tmp_path) == before


def fail(*arguments, **options):
    raise OSError(28, "No space left on device")


def test_a_root_that_is_a_file_is_reported(tmp_path):
    (tmp_path / "root").write_text("")
    with pytest.raises(DataError, match="a writable folder"):
        write(tmp_path / "root")


@pytest.mark.parametrize(
    "changes", [{"train_images": 0}, {"seed": -1}, {"image_size": (90, 80)}, {"image_size": (8, 9)}]
)
def test_numbers_out_of_range_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match="need at least one image"):
        write(tmp_path, **changes)
    assert not list(tmp_path.iterdir())


def test_a_dataset_can_list_the_drawn_classes_alone(tmp_path):
    sizes = {"train_images": 3, "val_images": 1, "image_size": (64, 96)}
    content = {}
    for only_drawn in (True, False):
        root = write_shapes_dataset(tmp_path, **sizes, only_drawn=only_drawn)
        path = root / "coco/annotations/instances_train2017.json"
        content[only_drawn] = json.loads(path.read_text())
    names = {entry["name"] for entry in content[True].pop("categories")}
    assert names == {"stop sign", "sports ball", "kite", "pizza", "donut", "book"}
    assert len(content[False].pop("categories")) == 80
    assert content[True] == content[False]
