import numpy as np
import pytest

from d2scale.coco.records import Records, starts_from_counts
from d2scale.config import get_cfg
from d2scale.errors import ConfigError, DataError
from d2scale.memory.worst_case import assumed_worst_case, worst_case_of


def records(*images):
    """Images of (height, width, boxes)."""
    heights, widths, boxes = (np.array(column) for column in zip(*images, strict=True))
    return Records(
        np.array([b"a.jpg"] * len(images)),
        np.arange(len(images)),
        heights,
        widths,
        starts_from_counts(boxes),
        np.zeros((boxes.sum(), 4), dtype=np.float32),
        np.zeros(boxes.sum(), dtype=np.int64),
    )


def config(grouping=True, sizes=(640, 800)):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = sizes
    cfg.DATALOADER.ASPECT_RATIO_GROUPING = grouping
    return cfg


def test_without_a_dataset_both_limits_are_reached():
    assert assumed_worst_case(config()).sizes == ((800, 1333), (1333, 800))
    assert assumed_worst_case(config(grouping=False)).sizes == ((1333, 1333),)


def test_a_dataset_of_one_shape_is_padded_to_that_shape():
    worst = worst_case_of(config(), records((480, 640, 3), (480, 640, 17)))
    assert worst.sizes == ((800, 1067),)
    assert worst.boxes == 17


def test_the_highest_and_the_widest_image_may_meet_in_a_batch():
    images = records((500, 510, 1), (200, 640, 1), (640, 480, 1))
    assert worst_case_of(config(), images).sizes == ((800, 1333), (1067, 800))
    assert worst_case_of(config(grouping=False), images).sizes == ((1067, 1333),)


def test_samples_are_what_a_model_trains_on():
    worst = worst_case_of(config(sizes=(64,)), records((480, 640, 5)))
    samples = worst.samples(2)
    assert [tuple(sample["image"].shape) for sample in samples] == [(3, 64, 85)] * 2
    boxes = samples[0]["boxes"]
    assert boxes.shape == (5, 4)
    assert bool((boxes[:, 2:] > boxes[:, :2]).all())
    assert bool((boxes >= 0).all())
    assert float(boxes[:, 2].max()) <= 85


def test_a_dataset_without_annotations_is_refused():
    with pytest.raises(DataError, match="images with boxes"):
        worst_case_of(config(), records((480, 640, 0)))


def test_images_of_their_own_size_need_the_dataset():
    with pytest.raises(ConfigError, match="MIN_SIZE_TRAIN"):
        assumed_worst_case(config(sizes=(0,)))
    assert worst_case_of(config(sizes=(0,)), records((480, 640, 1))).size == (480, 640)
