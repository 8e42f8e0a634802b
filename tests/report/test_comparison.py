from itertools import count

import pytest

from d2scale.report.comparison import (
    comparable_groups,
    difference_of_runs,
    difference_to_published,
    evaluate_runs,
    nearest_published,
    why_not_comparable,
    why_not_comparable_to_published,
)
from d2scale.report.published import Publication, read_published
from d2scale.report.runs import Run, read_run
from run_folders import detections


@pytest.fixture
def judged(make_run, shapes):
    """Judge runs by their folders' settings and detections."""

    names = (f"run{number}" for number in count())

    def judged(*specs):
        notes = []
        folders = [make_run(next(names), **spec) for spec in specs]
        return evaluate_runs([read_run(folder, folder.name) for folder in folders], notes), notes

    return judged


def test_missing_columns_come_from_the_detections(judged, shapes):
    found = detections(shapes)
    ((each,), notes) = judged({"found": found})
    assert notes == ["run0: it reported no results; they are computed from its detections"]
    assert each.results["ARdet10"] > each.results["ARdet1"] > 0
    assert (each.images, len(each.classes)) == (12, 60)
    # What a run told of itself, with the digits of a log, is what the report keeps.
    told = round(each.results["AP"], 3)
    ((again,), _) = judged({"found": found, "results": {"AP": told}})
    assert (again.results["AP"], again.results["ARdet1"]) == (told, each.results["ARdet1"])


def test_detections_of_another_evaluation_give_no_noise(judged, shapes):
    ((each,), notes) = judged({"found": detections(shapes), "results": {"AP": 1.0}})
    assert each.noise is None
    assert each.detected is None
    assert each.results == {"AP": 1.0}
    assert "where the run reported 1.000" in notes[0]


def test_a_run_without_detections_keeps_its_results(judged):
    ((each,), notes) = judged({"results": {"AP": 12.0, "AP-dog": 3.0}})
    assert (each.results, each.class_results) == ({"AP": 12.0}, {"dog": 3.0})
    assert "no noise" in notes[0]


def test_runs_of_other_datasets_or_classes_are_not_put_together(judged):
    other = {"DATASETS": {"TEST": ["coco_2017_val"]}}
    (runs, _) = judged(
        {"results": {"AP": 1.0, "AP-dog": 1.0}},
        {"results": {"AP": 2.0, "AP-dog": 1.0}},
        {"results": {"AP": 3.0, "AP-dog": 1.0}, "config": other},
        {"results": {"AP": 4.0, "AP-dog": 1.0, "AP-cat": 1.0}},
        {},
        {
            "results": {"AP": 5.0, "AP-dog": 1.0},
            "config": {"TEST": {"DETECTIONS_PER_IMAGE": 10}},
        },
    )
    found = [[each.run.name for each in group] for group in comparable_groups(runs)]
    assert found == [["run0", "run1"], ["run2"], ["run3"], ["run4"], ["run5"]]
    assert "coco_2017_val" in why_not_comparable(runs[0], runs[2])
    assert "classes" in why_not_comparable(runs[0], runs[3])
    assert "no results" in why_not_comparable(runs[0], runs[4])
    assert "10 best" in why_not_comparable(runs[0], runs[5])


def test_differences_within_and_beyond_the_noise(judged, shapes):
    good, bad = detections(shapes, shift=1.0), detections(shapes, shift=9.0)
    ((one, same, worse), _) = judged({"found": good}, {"found": good}, {"found": bad})
    found = difference_of_runs(same, one)
    assert found.values["AP"] == 0
    assert found.beyond_noise == frozenset()
    found = difference_of_runs(worse, one)
    assert found.values["AP"] < -10
    assert "AP" in found.beyond_noise
    assert found.bands["AP"][0] < found.values["AP"] < found.bands["AP"][1] < 0


def test_differences_without_detections_have_no_band(judged):
    ((one, other), _) = judged({"results": {"AP": 1.0}}, {"results": {"AP": 3.0}})
    found = difference_of_runs(other, one)
    assert (found.values, found.bands) == ({"AP": 2.0}, {})


def publication(images, runs=()):
    (shipped,) = (each for each in read_published() if "MetaFCOS" in each.title)
    return Publication(
        "title", "source", "machine", shipped.test_set, images, (), tuple(runs) or shipped.runs
    )


def test_published_numbers_of_other_images_are_not_compared(judged, shapes):
    ((each,), _) = judged({"found": detections(shapes)})
    assert "12 images" in why_not_comparable_to_published(each, publication(5000))
    assert why_not_comparable_to_published(each, publication(12)) == ""
    found = difference_to_published(each, publication(12).runs[0])
    assert found.values["AP"] == pytest.approx(each.results["AP"] - 32.887)
    low, high = found.bands["AP"]
    assert high - low == pytest.approx(2 * each.noise.half_width("AP"))


def test_published_numbers_are_not_compared_where_the_images_are_not_known(judged):
    names = publication(1).runs[0].class_results
    results = {"AP": 30.0, **{f"AP-{name}": 30.0 for name in names}}
    ((each, other), _) = judged(
        {"results": results},
        {"results": results, "config": {"DATASETS": {"TEST": ["coco_2017_val"]}}},
    )
    assert "not known" in why_not_comparable_to_published(each, publication(5000))
    assert "the run was tested on coco_2017_val" in why_not_comparable_to_published(
        other, publication(5000)
    )


@pytest.mark.parametrize(
    ("batch", "ranks", "name"),
    [(16, 2, "1 baseline"), (16, 1, "2 same batch"), (32, 1, "3 large batch")],
)
def test_the_nearest_published_run(batch, ranks, name):
    run = Run("x", None, "d2scale", {"SOLVER.IMS_PER_BATCH": batch}, world_size=ranks)
    assert nearest_published(run, publication(5000)).name == f"published {name}"
