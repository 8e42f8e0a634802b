import json

import pytest

from d2scale.coco.catalog import ROOT_VARIABLE, datasets_root
from d2scale.coco.dataset import load_dataset
from d2scale.coco.shapes import write_shapes_dataset
from d2scale.errors import DataError
from meta_fcos.reproduction.data import datasets_under, make, read_subset, small_data, whole_coco

VAL = "coco/annotations/instances_val2017.json"


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """A stand-in for COCO, under ``DETECTRON2_DATASETS``."""
    root = write_shapes_dataset(tmp_path / "real", 12, 4, image_size=(64, 96))
    monkeypatch.setenv(ROOT_VARIABLE, str(root))
    return root


def test_without_coco_shapes_are_drawn(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "nowhere"))
    data = small_data(tmp_path / "out", (3, 2))
    assert data.name == "drawn shapes"
    make(data, read_subset(data))
    with datasets_under(data.root):
        assert len(load_dataset("coco_pretrain_val_base")) == 2
    assert datasets_root() == tmp_path / "nowhere"


def test_coco_is_cut_to_a_few_images_and_not_copied(coco, tmp_path):
    data = small_data(tmp_path / "out", (5, 2))
    make(data, read_subset(data))
    whole = load_dataset("coco_pretrain_train_base")
    with datasets_under(data.root):
        cut = load_dataset("coco_pretrain_train_base")
        assert len(load_dataset("coco_pretrain_val_base")) == 2
    assert len(cut) == 5
    count = cut.records.box_starts[-1]
    assert (cut.records.boxes == whole.records.boxes[:count]).all()
    assert (cut.records.classes == whole.records.classes[:count]).all()
    assert (cut.records.image_ids == whole.records.image_ids[:5]).all()
    assert (data.root / "coco" / "train2017").is_symlink()
    make(data, read_subset(data))  # a second time, as after an interruption


def test_every_part_that_is_missing_is_told_with_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path))
    with pytest.raises(DataError) as raised:
        whole_coco()
    lines = str(raised.value).splitlines()
    assert len(lines) == 4
    assert "http://images.cocodataset.org/zips/train2017.zip" in lines[2]


def test_a_part_of_coco_is_not_taken_for_none(coco, tmp_path):
    (coco / VAL).unlink()
    with pytest.raises(DataError, match="instances_val2017"):
        small_data(tmp_path / "out", (5, 2))


def test_a_broken_annotation_file_is_told_by_its_name(coco, tmp_path):
    (coco / VAL).write_text('{"images": [')
    with pytest.raises(DataError, match="instances_val2017"):
        read_subset(small_data(tmp_path / "out", (5, 2)))
    assert not (tmp_path / "out").exists()


def test_missing_images_are_told_before_anything_is_written(coco, tmp_path):
    name = json.loads((coco / VAL).read_text())["images"][0]["file_name"]
    (coco / "coco" / "val2017" / name).unlink()
    with pytest.raises(DataError, match=name):
        read_subset(small_data(tmp_path / "out", (5, 2)))
