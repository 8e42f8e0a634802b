from __future__ import annotations

from pathlib import Path

import pytest

from d2scale.coco import catalog
from d2scale.coco.catalog import (
    DatasetSpec,
    dataset_names,
    dataset_spec,
    register_coco_dataset,
)
from d2scale.coco.classes import (
    ALL_CATEGORY_IDS,
    BASE_CATEGORY_IDS,
    COCO_CLASSES,
    NOVEL_CATEGORY_IDS,
)
from d2scale.errors import DataError


def test_class_splits_are_coco():
    assert len(COCO_CLASSES) == 80
    assert len(BASE_CATEGORY_IDS) == 60
    assert len(NOVEL_CATEGORY_IDS) == 20
    assert sorted((*BASE_CATEGORY_IDS, *NOVEL_CATEGORY_IDS)) == list(ALL_CATEGORY_IDS)
    assert list(BASE_CATEGORY_IDS) == sorted(BASE_CATEGORY_IDS)
    assert (COCO_CLASSES[BASE_CATEGORY_IDS[0]], COCO_CLASSES[62]) == ("truck", "chair")


def test_names_resolve_under_the_environment_variable(monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", "/somewhere")
    assert dataset_spec("coco_pretrain_val_base") == DatasetSpec(
        Path("/somewhere/coco/annotations/instances_val2017.json"),
        Path("/somewhere/coco/val2017"),
        BASE_CATEGORY_IDS,
        tuple(COCO_CLASSES[category_id] for category_id in BASE_CATEGORY_IDS),
    )
    monkeypatch.delenv("DETECTRON2_DATASETS")
    assert dataset_spec("coco_2017_train").image_root == Path("datasets/coco/train2017")
    assert dataset_spec("coco_2017_train").category_ids == ALL_CATEGORY_IDS


def test_unknown_name_lists_the_names():
    with pytest.raises(DataError, match=r"^DATASETS.TEST is 'coco_2017'; allowed: ") as caught:
        dataset_spec("coco_2017", key="DATASETS.TEST")
    assert all(name in str(caught.value) for name in dataset_names())
    assert "\n" not in str(caught.value)


def test_registered_names_are_found_and_not_replaced(monkeypatch):
    monkeypatch.setattr(catalog, "_DATASETS", dict(catalog._DATASETS))
    register_coco_dataset("mine", "/data/mine.json", "mine/images")
    register_coco_dataset("mine", "/data/mine.json", "mine/images")
    assert dataset_spec("mine").json_file == Path("/data/mine.json")
    assert "mine" in dataset_names()
    with pytest.raises(ValueError, match="already registered"):
        register_coco_dataset("mine", "/data/other.json", "mine/images")
