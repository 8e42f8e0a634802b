from __future__ import annotations

import logging
import pickle
import shutil

import numpy as np
import pytest

from d2scale.coco import catalog
from d2scale.coco.annotation_file import read_annotation_file
from d2scale.coco.catalog import register_coco_dataset
from d2scale.coco.dataset import check_datasets, load_dataset, load_training_dataset
from d2scale.config.defaults import get_cfg
from d2scale.errors import DataError


def make_cfg(train=("coco_pretrain_train_base",), test=()):
    cfg = get_cfg()
    cfg.DATASETS.TRAIN = train
    cfg.DATASETS.TEST = test
    return cfg


def faults_of(name="coco_2017_train"):
    with pytest.raises(DataError) as caught:
        load_dataset(name, key="DATASETS.TRAIN")
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.faults)
    return lines


def test_reads_images_boxes_and_classes(coco):
    dataset = load_dataset("coco_2017_train")
    assert len(dataset) == len(dataset.records) == 4
    assert dataset.class_names[:2] == ("person", "bicycle")
    assert dataset.json_file == str(coco.json_file)
    record = dataset.records[0]
    assert (record.file_name, record.image_id) == (str(coco.images / "1.png"), 1)
    assert (record.height, record.width) == (40, 60)
    assert record.boxes.dtype == np.float32
    assert record.boxes.tolist() == [[0, 0, 30.5, 20], [10, 10, 30, 30], [1, 2, 4, 6]]
    assert record.classes.dtype == np.int64
    assert [dataset.category_ids[c] for c in record.classes] == [10, 1, 8]
    # The crowd is no training box.
    assert dataset.records[2].boxes.tolist() == [[20, 20, 50, 50]]
    with pytest.raises(IndexError):
        dataset.records[4]


@pytest.mark.parametrize(
    ("split", "classes", "boxes"), [("base", 60, [2, 1, 1, 0]), ("novel", 20, [1, 0, 0, 1])]
)
def test_splits_keep_all_images_and_their_own_boxes(coco, split, classes, boxes):
    dataset = load_dataset(f"coco_pretrain_train_{split}")
    assert len(dataset.class_names) == len(dataset.category_ids) == classes
    assert dataset.records.box_counts.tolist() == boxes
    names = {dataset.class_names[c] for record in dataset.records for c in record.classes}
    assert names == ({"truck", "traffic light", "toothbrush"} if split == "base" else {"person"})


def test_images_are_in_the_order_of_their_ids(coco):
    coco.content["images"].reverse()
    coco.write()
    assert load_dataset("coco_2017_train").records.image_ids.tolist() == [1, 2, 3, 4]


def test_training_leaves_out_images_without_boxes(coco):
    cfg = make_cfg()
    dataset = load_training_dataset(cfg)
    assert [record.image_id for record in dataset.records] == [1, 2, 3]
    assert dataset.records[2].classes.tolist() == [59]
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    assert len(load_training_dataset(cfg)) == 4


def test_several_training_sets_become_one(coco, coco_val):
    dataset = load_training_dataset(make_cfg(("coco_2017_train", "coco_2017_val")))
    assert len(dataset) == 8
    assert dataset.records[5].file_name == str(coco_val.images / "2.png")
    assert dataset.records[5].boxes.tolist() == [[5, 5, 15, 25]]


def test_training_sets_of_different_classes_are_refused(coco, coco_val):
    cfg = make_cfg(("coco_pretrain_train_base", "coco_pretrain_val_novel"))
    with pytest.raises(DataError, match="allowed: datasets with the 60 classes of coco_pretrain_t"):
        load_training_dataset(cfg)


def test_a_registered_dataset_has_the_classes_of_its_file(coco, monkeypatch):
    monkeypatch.setattr(catalog, "_DATASETS", dict(catalog._DATASETS))
    coco.content["categories"] = [{"id": 10, "name": "b"}, {"id": 8, "name": "a"}]
    coco.content["annotations"] = coco.content["annotations"][:2]
    coco.write()
    register_coco_dataset("mine", coco.json_file, coco.images)
    register_coco_dataset("mine_b", coco.json_file, coco.images, category_ids=[10])
    dataset = load_dataset("mine")
    assert (dataset.class_names, dataset.category_ids) == (("a", "b"), (8, 10))
    # Its own names for ids that COCO has too would be a mistake only under COCO's own names.
    assert load_dataset("mine_b").class_names == ("b",)


def test_records_survive_a_worker(coco):
    records = pickle.loads(pickle.dumps(load_dataset("coco_2017_train").records))
    assert records[1].file_name == str(coco.images / "2.png")


def test_missing_dataset_names_the_folder_and_the_cure(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    (line,) = faults_of()
    assert line.startswith("DATASETS.TRAIN is 'coco_2017_train'")
    assert str(tmp_path / "coco/annotations/instances_train2017.json") in line
    assert "set DETECTRON2_DATASETS to the folder" in line


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "JSON in COCO's format; Expecting property name"),
        ("[]", "allowed: a JSON object; it holds a list"),
        ('{"images": [], "categories": []}', "'annotations' of "),
        ('{"images": {}, "annotations": [], "categories": []}', "is 'dict'; allowed: a list"),
        ('{"images": [], "annotations": [], "categories": []}', "lists none"),
        ("\x00\x01", "JSON in COCO's format"),
        ("[" * 10**6, "JSON in COCO's format"),
    ],
)
def test_files_in_another_format_are_named(coco, text, told):
    coco.json_file.write_text(text)
    lines = faults_of()
    assert told in lines[0]
    assert str(coco.json_file) in lines[0]


def test_a_folder_for_an_annotation_file(coco):
    coco.json_file.unlink()
    coco.json_file.mkdir()
    assert "a readable file" in faults_of()[0]


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("images", "height", 0),
        ("images", "file_name", None),
        ("annotations", "bbox", [1, 2, 3]),
        ("annotations", "bbox", [1, 2, 3, "4"]),
        ("annotations", "bbox", [1, 2, 3, None]),
        ("annotations", "bbox", [1, 2, 3, 10**400]),
        ("annotations", "bbox", [1, 2, 3, True]),
        ("annotations", "image_id", "1"),
        ("annotations", "id", True),
        ("annotations", "iscrowd", "0"),
        ("annotations", "area", 10**400),
        ("images", "height", 2**63),
        ("images", "id", 10**25),
        ("images", "file_name", "a\0b"),
        ("categories", "name", ""),
    ],
)
def test_entries_with_wrong_fields_are_counted(coco, section, field, value):
    for entry in coco.content[section][1:3]:
        entry[field] = value
    coco.write()
    (line,) = faults_of()
    total = len(coco.content[section])
    assert line.startswith(f"2 of {total} entries in {section!r} of {coco.json_file} is 'no. 1, 2'")
    assert field in line


def test_repeated_ids_are_named(coco):
    coco.content["images"][1]["id"] = 1
    coco.content["annotations"][2]["id"] = 1
    coco.write()
    images, annotations = faults_of()
    assert "'1 more than once'" in images
    assert "'annotations'" in annotations


def test_all_faults_are_reported_at_once_and_in_one_line_each(coco):
    for number in range(40):
        coco.add(id=100 + number, image_id=77)
    coco.add(id=200, category_id=12)
    coco.add(id=201, bbox=[1000, 0, 10, 10])
    coco.add(id=202, bbox=[5, 5, -1, 10])
    coco.add(id=203, bbox=[5, 5, float("nan"), 10])
    coco.add(id=204, bbox=[5, 5, 0, 10])
    coco.add(id=205, bbox=[50, 5, 30, 10])
    coco.content["categories"] = coco.content["categories"][1:]
    coco.write()
    (coco.images / "3.png").unlink()
    lines = faults_of()
    found = "\n".join(lines)
    assert len(lines) == 7
    assert "image_id of 40 of 53 annotations" in found
    assert "(annotations 100, 101, 102 and 37 more)" in found
    assert "category_id of 3 of 53 annotations in" in found
    assert "is '1, 12'; allowed: one of its 79 categories" in found
    assert "is 'without ids 1'; allowed: all 80 classes" in found
    assert "1 of 4 images of" in found
    assert "(3.png)" in found
    assert "bbox of 3 of 52 annotations" in found
    assert "'outside the image, negative or not a number (annotations 201, 202, 203)'" in found
    assert "'of no size (annotations 204)'" in found
    assert "'more than 2 pixels over the edge (annotations 205)'" in found


def test_other_names_for_cocos_ids_are_reported(coco):
    coco.content["categories"][0]["name"] = "dog"
    coco.write()
    (line,) = faults_of()
    assert "'1 dog for person'; allowed: COCO's names" in line


def test_what_coco_itself_contains_loads(coco, caplog):
    """A few boxes of no size and boxes a little over the edge, among very many."""
    coco.add_good(3000)
    coco.add(bbox=[10, 20, 5.5, 0])
    coco.add(bbox=[-0.4, 0, 60.9, 40.2])
    coco.add(bbox=[30, 20, 40, 10])
    coco.write()
    with caplog.at_level(logging.INFO):
        dataset = load_dataset("coco_2017_train")
    boxes = dataset.records[0].boxes
    assert len(boxes) == 3 + 3000 + 2
    assert boxes[-2].tolist() == [0, 0, 60, 40]
    assert boxes[-1].tolist() == [30, 20, 60, 30]
    (line,) = [r.getMessage() for r in caplog.records if "no size" in r.getMessage()]
    assert "left out 1 boxes of no size and cut 2 of 3010 boxes" in line
    assert "10.0 pixels" in line


def test_boxes_of_crowds_are_not_judged(coco):
    coco.add(bbox=[0, 0, 0, 0], iscrowd=1)
    coco.write()
    assert len(load_dataset("coco_2017_train")) == 4


def test_polygons_are_skipped_and_nothing_else(coco, tmp_path):
    coco.content["annotations"][0]["segmentation"] = {"counts": [1, 2], "size": [3, 4]}
    coco.content["annotations"][1]["segmentation"] = []
    coco.content["images"][0]["file_name"] = 'a "segmentation": [1, 2], b.png'
    coco.write()
    file = read_annotation_file(coco.json_file)
    assert file.file_names[0] == 'a "segmentation": [1, 2], b.png'
    assert file.boxes.tolist() == [a["bbox"] for a in coco.content["annotations"]]


def test_check_reports_the_faults_of_all_datasets(coco, coco_val):
    coco.add(image_id=77)
    coco.write()
    shutil.rmtree(coco_val.images)
    test = ("coco_pretrain_val_base", "coco_2017_vla", "coco_pretrain_train_base")
    with pytest.raises(DataError) as caught:
        check_datasets(make_cfg(test=test))
    lines = str(caught.value).splitlines()
    # The train file's fault is told once, though two keys name it.
    assert len(lines) == 3
    assert "image_id of 1 of 8" in lines[0]
    assert str(coco_val.images) in lines[1]
    assert "DATASETS.TEST is 'coco_2017_vla'" in lines[2]


def test_check_wants_the_same_classes_in_training_and_test(coco, coco_val):
    check_datasets(make_cfg(test=("coco_pretrain_val_base",)))
    with pytest.raises(DataError, match=r"DATASETS.TEST is 'coco_2017_val'; allowed: .* 60 class"):
        check_datasets(make_cfg(test=("coco_2017_val",)))
    check_datasets(make_cfg(train=(), test=("coco_2017_val",)), eval_only=True)


def test_check_wants_datasets(coco):
    with pytest.raises(DataError, match=r"^DATASETS\.TRAIN is"):
        check_datasets(make_cfg(train=()))
    with pytest.raises(DataError, match=r"^DATASETS\.TEST is"):
        check_datasets(make_cfg(), eval_only=True)


def test_training_set_without_boxes_is_refused(coco):
    coco.content["annotations"] = []
    coco.write()
    with pytest.raises(DataError, match="allowed: datasets with boxes of their classes"):
        check_datasets(make_cfg())


def test_real_coco_loads(real_coco):
    base = load_dataset("coco_pretrain_train_base")
    novel = load_dataset("coco_pretrain_train_novel")
    whole = load_dataset("coco_2017_train")
    assert len(base) == len(novel) == len(whole) >= 128
    assert len(base.records.boxes) + len(novel.records.boxes) == len(whole.records.boxes)
    check_datasets(make_cfg(test=("coco_pretrain_val_base",)))
