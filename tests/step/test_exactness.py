"""Real processes, a real MetaFCOS: the split of a step over ranks and micro-batches is exact.

A few of the combinations that benchmarks/exactness.py goes through.
"""

from __future__ import annotations

import pytest
from exactness import TOLERANCE
from split_steps import (
    distance,
    gradient_errors,
    loader,
    on_ranks,
    recipe,
    trained_weights,
)

from d2scale.coco.shapes import write_shapes_dataset

pytestmark = pytest.mark.timeout(280)


@pytest.fixture(scope="module", autouse=True)
def _datasets(tmp_path_factory):
    root = write_shapes_dataset(tmp_path_factory.mktemp("shapes"), 32, 2, image_size=(64, 96))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DETECTRON2_DATASETS", str(root))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def cfg():
    with recipe() as cfg:
        yield cfg


def case(dtype, **others):
    return {"dtype": dtype, **others}


def test_gradient_is_that_of_the_big_batch(cfg):
    # 13 images on 3 ranks are 5, 4 and 4; in 2 micro-batches 3 and 2, 2 and 2, 2 and 2.
    cases = [
        case(dtype, guard=guard, **{"total batch": 13, "micro-batches": micro_batches})
        for dtype, micro_batches in (("float64", 1), ("float64", 4), ("float32", 2))
        for guard in (False, True)
    ]
    for each, (error, _) in zip(cases, on_ranks(3, gradient_errors, cfg, cases), strict=True):
        assert error < TOLERANCE[each["dtype"]], each


def test_weights_after_10_steps_are_those_of_one_rank(cfg):
    cases = [
        case("float64", guard=True, **{"images per GPU": 2}),
        case("float32", guard=False, **{"images per GPU": 3}),
    ]
    whole = [case(each["dtype"], guard=False, **{"images per GPU": 5}) for each in cases]
    start = trained_weights(cfg, whole, 0, 5)
    expected = trained_weights(cfg, whole, 10, 5)
    found = on_ranks(2, trained_weights, cfg, cases, 10, 5)
    for allowed, *weights in zip((1e-10, 1e-3), found, expected, start, strict=True):
        assert distance(*weights) < allowed


def test_without_exact_the_padding_depends_on_the_rank(cfg):
    def paddings(exact):
        ranks = [loader(cfg, 16, ranks=2, this=this, exact=exact) for this in (0, 1)]
        return {sample.get("pad_to") for each in ranks for sample in next(each)}

    assert paddings(exact=False) == {None}
    assert len(paddings(exact=True)) == 1
