"""Two machines' datasets are one if what was read of them is the same."""

from __future__ import annotations

import json

import pytest

from coco_folder import CocoFolder
from d2scale.coco.dataset import check_datasets
from d2scale.config.defaults import get_cfg


@pytest.fixture
def facts(monkeypatch):
    """What a run knows of the datasets in a folder that trains on ``coco_2017_train``."""

    def read(folder):
        folder.write()
        monkeypatch.setenv("DETECTRON2_DATASETS", str(folder.root))
        cfg = get_cfg()
        cfg.DATASETS.TRAIN = ("coco_2017_train",)
        return check_datasets(cfg)

    return read


@pytest.fixture
def folders(tmp_path):
    return [CocoFolder(tmp_path / name) for name in ("one", "two")]


def test_the_same_data_elsewhere_are_the_same(facts, folders):
    one, two = folders
    expected = facts(one)
    assert expected.images == 4
    assert list(expected.digests) == [
        *("images of coco_2017_train", "boxes of coco_2017_train", "classes of coco_2017_train")
    ]
    assert expected.digests["boxes of coco_2017_train"].startswith("6 (digest ")
    two.content["images"].reverse()
    two.json_file.write_text(json.dumps(two.content, indent=1))
    assert facts(two) == expected


@pytest.mark.parametrize(
    ("section", "change", "kinds"),
    [
        ("annotations", {"bbox": [5, 5, 10, 21]}, ["boxes"]),
        ("annotations", {"category_id": 2}, ["boxes"]),
        ("images", {"file_name": "2.png"}, ["images"]),
        ("images", {"width": 61}, ["images"]),
    ],
)
def test_what_differs_is_named(facts, folders, section, change, kinds):
    one, two = folders
    two.content[section][0].update(change)
    expected, found = facts(one).digests, facts(two).digests
    assert [key.partition(" ")[0] for key in found if found[key] != expected[key]] == kinds


def test_other_classes_are_named(facts, folders, monkeypatch):
    one, two = folders
    for folder in folders:
        folder.content["categories"][0]["name"] = f"someone of {folder.root.name}"
    keys = ("NAMES", "IM_DIRS", "JSON_FILES")

    def digests(folder):
        folder.write()
        cfg = get_cfg()
        own = cfg.D2GO_DATA.DATASETS.COCO_INJECTION
        for key, value in zip(keys, ("mine", folder.images, folder.json_file), strict=True):
            own[key] = [str(value)]
        cfg.DATASETS.TRAIN = ("mine",)
        return check_datasets(cfg).digests

    expected, found = digests(one), digests(two)
    assert [key for key in found if found[key] != expected[key]] == ["classes of mine"]
