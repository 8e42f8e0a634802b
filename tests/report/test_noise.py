import numpy as np
import pytest

from d2scale.coco.accumulate import METRICS
from d2scale.coco.dataset import load_dataset
from d2scale.coco.metric import coco_metrics
from d2scale.report.detections import read_detections
from d2scale.report.noise import bootstrap, weighted_metrics
from d2scale.report.runs import read_run
from run_folders import annotations, detections

TEST_SET = "coco_pretrain_val_base"


@pytest.fixture
def detect(make_run, shapes):
    def detect(name="run", seed=0, shift=3.0):
        folder = make_run(name, found=detections(shapes, seed, shift))
        return read_detections(read_run(folder, name))

    return detect


def official(root, counts, found):
    """pycocotools' answer when every image is there as often as it counts."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    content = annotations(root)
    images, boxes, results = [], [], []
    for image, count in zip(sorted(content["images"], key=lambda i: i["id"]), counts, strict=True):
        for copy in range(int(count)):
            new = image["id"] + 10_000 * copy
            images.append({**image, "id": new})
            boxes += [
                {**each, "id": len(boxes) + number + 1, "image_id": new}
                for number, each in enumerate(
                    each for each in content["annotations"] if each["image_id"] == image["id"]
                )
            ]
            results += [
                {**each, "image_id": new} for each in found if each["image_id"] == image["id"]
            ]
    truth = COCO()
    truth.dataset = {"images": images, "annotations": boxes, "categories": content["categories"]}
    truth.createIndex()
    evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
    evaluator.params.catIds = list(load_dataset(TEST_SET).category_ids)
    evaluator.evaluate()
    evaluator.accumulate()
    evaluator.summarize()
    stats = 100 * evaluator.stats
    # -1 is pycocotools' word for nothing to find.
    return dict(zip(METRICS, np.where(stats < 0, np.nan, stats), strict=True))


def test_the_result_itself_is_the_official_one(detect, shapes):
    detected = detect()
    noise = bootstrap(detected, resamples=2)
    expected = coco_metrics(load_dataset(TEST_SET), detections(shapes))
    assert noise.exact.keys() == expected.keys()
    for name, value in expected.items():
        assert noise.exact[name] == pytest.approx(value, abs=1e-9, nan_ok=True), name
    assert 20 < noise.exact["AP"] < 99


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_is_what_pycocotools_makes_of_the_drawn_images(detect, shapes, seed, capsys):
    detected = detect(seed=seed)
    images = len(detected.dataset)
    counts = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images))
    found = weighted_metrics(detected, np.stack([np.ones_like(counts), counts, 3 * counts]))
    expected = official(shapes, counts, detections(shapes, seed))
    for name in METRICS:
        assert found[name][1] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name
        # Three of each are no other mixture.
        assert found[name][2] == pytest.approx(expected[name], abs=1e-9, nan_ok=True), name


def test_large_test_sets_are_done_in_turns_with_the_same_result(detect, monkeypatch):
    detected = detect()
    at_once = bootstrap(detected, resamples=20)
    monkeypatch.setattr("d2scale.coco.accumulate._DETECTIONS_AT_ONCE", 30)
    in_turns = bootstrap(detected, resamples=20)
    for name, draws in at_once.draws.items():
        np.testing.assert_array_equal(in_turns.draws[name], draws)


def test_the_band_is_around_the_result_and_as_wide_as_the_resamples(detect):
    noise = bootstrap(detect(), resamples=400)
    low, high = noise.band("AP")
    assert low < noise.exact["AP"] < high
    spread = noise.draws["AP"].std()
    assert high - low == pytest.approx(2 * 1.96 * spread, rel=0.15)
    assert noise.half_width("AP") == pytest.approx((high - low) / 2)
    assert noise.band("nothing of the kind") is None


def test_runs_share_their_draws_so_that_a_difference_is_known_better(detect):
    one, other = (bootstrap(detect(name, shift=shift)) for name, shift in (("a", 3), ("b", 4)))
    low, high = one.difference(other, "AP")
    assert low <= one.exact["AP"] - other.exact["AP"] <= high
    assert high - low < one.band("AP")[1] - one.band("AP")[0]
    assert bootstrap(detect("c")).difference(one, "AP") == pytest.approx((0, 0), abs=1e-12)


def test_a_class_without_boxes_has_no_noise(detect):
    noise = bootstrap(detect(), resamples=5)
    assert np.isnan(noise.exact["AP-giraffe"])
    assert noise.band("AP-giraffe") is None


def test_nothing_detected_is_zero_without_noise(make_run, shapes):
    run = read_run(make_run(found=[]), "run")
    noise = bootstrap(read_detections(run), resamples=5)
    assert (noise.exact["AP"], noise.half_width("AP")) == (0, 0)
