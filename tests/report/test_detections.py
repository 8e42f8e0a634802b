import json

import pytest

from d2scale.errors import DataError
from d2scale.report.detections import evaluation_spec, read_detections, read_evaluation_set
from d2scale.report.runs import read_run
from run_folders import detections


def read(folder):
    return read_detections(read_run(folder, "run"))


def test_detections_and_truth_are_numbered_alike(make_run, shapes):
    detected = read(make_run(found=detections(shapes)))
    assert len(detected.dataset) == 12
    assert len(detected.dataset.class_names) == 60
    names = detected.dataset.class_names
    assert names[detected.detections.classes.min()] in names
    assert detected.detections.images.max() < 12
    assert detected.max_dets == 100


def test_the_limit_of_detections_follows_the_key_in_d2scale_alone(make_run, shapes):
    config = {"TEST": {"DETECTIONS_PER_IMAGE": 7}}
    found = detections(shapes)
    assert read(make_run("own", found=found, config=config)).max_dets == 7
    d2go = make_run("d2go", found=found, config={**config, "D2GO_DATA": {"X": 1}})
    assert read(d2go).max_dets == 100


@pytest.mark.parametrize(
    "place", ["coco_pretrain_val_base", "default/final/coco_pretrain_val_base"]
)
def test_other_engines_put_the_file_elsewhere(make_run, shapes, place):
    folder = make_run(found=detections(shapes))
    target = folder / "inference" / place
    target.mkdir(parents=True)
    file = folder / "inference" / "coco_instances_results.json"
    file.rename(target / file.name)
    assert len(read(folder).detections.scores)


ENTRY = {"image_id": 1, "category_id": 13, "bbox": [0, 0, 5, 5], "score": 0.5}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[{", "COCO's results format"),
        ("{}x", "COCO's results format"),
        ("3", "COCO's results format"),
        (json.dumps([{**ENTRY, "bbox": [0, 0, 5]}]), "COCO's results format"),
        (json.dumps([{"image_id": 1}]), "COCO's results format"),
        (json.dumps([{**ENTRY, "score": float("nan")}]), "finite"),
        (json.dumps([{**ENTRY, "image_id": 77}]), "image 77 is not in"),
    ],
)
def test_broken_or_foreign_detections_are_reported(make_run, shapes, content, message):
    folder = make_run(found=[])
    (folder / "inference" / "coco_instances_results.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read(folder)


def test_missing_detections_or_ground_truth_are_reported(make_run, shapes, monkeypatch, tmp_path):
    with pytest.raises(DataError, match="evaluate the run"):
        read(make_run("no detections"))
    unknown = make_run("unknown", found=[], config={"DATASETS": {"TEST": ["somebodys"]}})
    with pytest.raises(DataError, match="not known here"):
        read(unknown)
    none = make_run("none", found=[], config={"DATASETS": {"TEST": []}})
    with pytest.raises(DataError, match="test set is not known"):
        read(none)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match="DETECTRON2_DATASETS"):
        read(make_run("elsewhere", found=[]))


def test_an_own_test_set_that_is_gone_is_told_with_what_helps(tmp_path, monkeypatch):
    own = {"NAMES": ["mine"], "IM_DIRS": [str(tmp_path)], "JSON_FILES": [str(tmp_path / "a.json")]}
    cfg = {"D2GO_DATA": {"DATASETS": {"COCO_INJECTION": own}}}
    with pytest.raises(DataError, match=r"a.json not found; correct the path"):
        read_evaluation_set("mine", evaluation_spec("mine", cfg))
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DataError, match=r"val2017.json not found; set DETECTRON2_DATASETS"):
        read_evaluation_set("coco_2017_val", evaluation_spec("coco_2017_val", {}))
