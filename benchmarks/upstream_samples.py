"""Samples with everything that detectron2's models train on, drawn at random."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

CLASSES, KEYPOINTS, SEGMENTS = 80, 17, 54
_IGNORED = 255  # of a semantic label


def draw(virtual_rank: int, step: int, count: int) -> list[dict[str, Any]]:
    """Return the images of a virtual rank in a step, 64 to 128 pixels wide and high."""
    random = np.random.RandomState([virtual_rank, step])
    return [_draw_one(random) for _ in range(count)]


def _draw_one(random: np.random.RandomState) -> dict[str, Any]:
    from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks

    height, width = random.randint(64, 129, 2).tolist()
    objects = random.randint(1, 5)
    corners = random.rand(objects, 2) * [width * 0.6, height * 0.6]
    boxes = np.concatenate([corners, corners + 10 + random.rand(objects, 2) * 15], 1)
    instances = Instances((height, width))
    instances.gt_boxes = Boxes(torch.from_numpy(boxes))
    # All are persons to the keypoint model, which knows no other class.
    instances.gt_classes = torch.from_numpy(random.randint(0, CLASSES, objects))
    instances.gt_masks = PolygonMasks([[_diamond(box)] for box in boxes])
    points = boxes[:, None, :2] + random.rand(objects, KEYPOINTS, 2) * 10
    visible = random.randint(0, 3, (objects, KEYPOINTS, 1))
    instances.gt_keypoints = Keypoints(np.concatenate([points, visible], 2))
    image = torch.from_numpy(random.randint(0, 256, (3, height, width)).astype(np.uint8))
    segments = torch.full((height, width), _IGNORED)
    segments[: height // 2] = int(random.randint(SEGMENTS))
    segments[height // 2 : -4] = int(random.randint(SEGMENTS))
    size = {"height": height, "width": width}
    return {"image": image, "instances": instances, "sem_seg": segments, **size}


def as_persons(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Let all objects be of class 0, the only one of the keypoint model."""
    for sample in samples:
        sample["instances"].gt_classes.zero_()
    return samples


def _diamond(box: np.ndarray) -> np.ndarray:
    left, top, right, bottom = box
    x, y = (left + right) / 2, (top + bottom) / 2
    return np.array([left, y, x, top, right, y, x, bottom])
