from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from d2scale.config.defaults import get_cfg
from d2scale.engine.data.sampling import Draw
from d2scale.engine.data.transforms import (
    Augmentation,
    ResizeAndFlip,
    input_faults,
    transform_boxes,
)
from d2scale.errors import ConfigError


def training(cfg_changes=()):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 50, 60)
    cfg.merge_from_list(list(cfg_changes))
    return ResizeAndFlip.for_training(cfg)


def drawn(augmentation, seed=0, images=3000, size=(40, 40)):
    return [augmentation.draw(seed, Draw(image, 0), *size) for image in range(images)]


def test_choice_takes_every_size_and_mirrors_half():
    found = Counter(drawn(training()))
    assert set(found) == {Augmentation(s, s, f) for s in (40, 50, 60) for f in (False, True)}
    assert min(found.values()) > 400


def test_range_takes_both_ends():
    changes = ["INPUT.MIN_SIZE_TRAIN", (40, 43), "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]
    found = Counter(a.height for a in drawn(training(changes)))
    assert set(found) == {40, 41, 42, 43}
    assert min(found.values()) > 600


def test_no_mirroring_when_not_wanted():
    assert not any(a.flip for a in drawn(training(["INPUT.RANDOM_FLIP", "none"])))
    testing = ResizeAndFlip.for_testing(get_cfg())
    assert set(drawn(testing, images=50, size=(480, 640))) == {Augmentation(800, 1067, False)}


def test_augmentation_depends_on_seed_epoch_and_image():
    augmentation = training()
    first = drawn(augmentation, images=50)
    assert drawn(augmentation, images=50) == first
    assert drawn(augmentation, seed=1, images=50) != first
    other_epoch = [augmentation.draw(0, Draw(image, 1), 40, 40) for image in range(50)]
    assert other_epoch != first


def test_boxes_move_with_the_image():
    boxes = np.array([[10, 20, 30, 40], [0, 0, 100, 80]], dtype=np.float32)
    moved, kept = transform_boxes(boxes, 80, 100, Augmentation(160, 50, flip=False))
    assert moved.dtype == np.float32
    assert moved.tolist() == [[5, 40, 15, 80], [0, 0, 50, 160]]
    moved, kept = transform_boxes(boxes, 80, 100, Augmentation(160, 50, flip=True))
    assert moved.tolist() == [[35, 40, 45, 80], [0, 0, 50, 160]]
    assert kept.all()
    assert boxes[0].tolist() == [10, 20, 30, 40]


def test_boxes_that_vanish_are_left_out():
    boxes = np.array([[10, 20, 10, 40], [5, 5, 9, 9], [3, 3, 3.000001, 9]], dtype=np.float32)
    moved, kept = transform_boxes(boxes, 80, 100, Augmentation(40, 50, flip=False))
    assert kept.tolist() == [False, True, False]
    assert moved.tolist() == [[2.5, 2.5, 4.5, 4.5]]
    moved, kept = transform_boxes(boxes[:0], 80, 100, Augmentation(40, 50, flip=True))
    assert moved.shape == (0, 4)


def test_all_faulty_input_keys_are_told():
    cfg = get_cfg()
    assert not list(input_faults(cfg))
    cfg.INPUT.FORMAT = "YUV"
    cfg.INPUT.RANDOM_FLIP = "vertical"
    cfg.INPUT.MIN_SIZE_TRAIN = (800, 640)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "range"
    cfg.INPUT.MAX_SIZE_TRAIN = 0
    cfg.INPUT.MIN_SIZE_TEST = -1
    with pytest.raises(ConfigError) as caught:
        ResizeAndFlip.for_training(cfg)
    lines = str(caught.value).splitlines()
    assert len(lines) == 5
    assert "INPUT.RANDOM_FLIP is 'vertical'; allowed: horizontal, none" in lines[1]
    cfg.INPUT.MIN_SIZE_TRAIN = ()
    assert any(fault.key == "INPUT.MIN_SIZE_TRAIN" for fault in input_faults(cfg))
