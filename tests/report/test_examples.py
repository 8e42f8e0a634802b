import io

import numpy as np
import pytest
from PIL import Image

from d2scale.errors import DataError
from d2scale.report.comparison import evaluate_runs
from d2scale.report.drawing import class_colour
from d2scale.report.examples import examples_section
from d2scale.report.runs import read_run
from run_folders import detections


@pytest.fixture
def judged(make_run, shapes):
    def judged(**found):
        runs = [read_run(make_run(name, found=each), name) for name, each in found.items()]
        return evaluate_runs(runs, [])

    return judged


def count_colour(picture, colour):
    with Image.open(io.BytesIO(picture.light)) as image:
        pixels = np.asarray(image).astype(int)
    # JPEG blurs colours.
    return int((np.abs(pixels - np.array(colour)).max(axis=2) < 60).sum())


def test_ground_truth_stands_beside_what_each_run_found(judged, shapes):
    notes = []
    section = examples_section(judged(a=detections(shapes), b=[]), notes)
    assert notes == []
    groups = [picture.group for picture in section.pictures]
    assert len(set(groups)) == 4
    titles = [picture.title for picture in section.pictures]
    for group in dict.fromkeys(groups):
        assert [t for t in titles if t.endswith(f"image {group}")] == [
            f"ground truth, image {group}",
            f"a, image {group}",
            f"b, image {group}",
        ]
    assert section.paragraphs == (
        "a: detections with a score of 0.30 and above.",
        "b: the 3 best detections of each image, none of which reaches 0.30.",
    )
    assert len({picture.name for picture in section.pictures}) == 12
    # Stop signs are the 4th class: a's false ones are drawn, b's picture is as it was.
    colour = class_colour(3)
    assert sum(count_colour(picture, colour) for picture in section.pictures[1::3]) > 100


def test_a_run_that_is_never_sure_shows_its_best(judged, shapes):
    unsure = [{**each, "score": each["score"] / 10} for each in detections(shapes)]
    section = examples_section(judged(a=unsure), [])
    assert "3 best detections" in section.paragraphs[0]
    plain = examples_section(judged(b=[]), [])
    assert all(
        one.light != other.light
        for one, other in zip(section.pictures[1::2], plain.pictures[1::2], strict=True)
    )


def test_unreadable_images_are_named_and_others_taken(judged, shapes, tmp_path, monkeypatch):
    (judged_run,) = judged(a=detections(shapes))
    shown = {picture.group for picture in examples_section([judged_run], []).pictures}
    broken = sorted(shown)[0]
    copy = tmp_path / "coco"
    copy.mkdir()
    (copy / "annotations").symlink_to(shapes / "coco" / "annotations")
    (copy / "val2017").mkdir()
    for path in (shapes / "coco" / "val2017").iterdir():
        good = int(path.stem) != int(broken)
        (copy / "val2017" / path.name).write_bytes(path.read_bytes() if good else b"no image")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    notes = []
    section = examples_section(judged(again=detections(shapes)), notes)
    groups = {picture.group for picture in section.pictures}
    assert len(groups) == 4
    assert broken not in groups
    assert f"{int(broken):012d}.jpg" in notes[0]


def refuse(path):
    raise DataError([])


def test_without_detections_or_images_there_are_no_examples(judged, shapes, make_run, monkeypatch):
    run = read_run(make_run("none", results={"AP": 1.0}), "none")
    assert examples_section(evaluate_runs([run], []), []) is None
    known = judged(a=detections(shapes))
    monkeypatch.setattr("d2scale.report.examples.read_rgb", refuse)
    assert examples_section(known, []) is None
