"""Turning the head's outputs into detections: scores, thresholds and NMS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import batched_nms

from meta_fcos.head import HeadOutputs
from meta_fcos.targets import locate

Detections = dict[str, Tensor]


@dataclass(frozen=True)
class InferenceRule:
    """How detections are chosen; :mod:`meta_fcos.config` describes the settings."""

    strides: tuple[int, ...] = (8, 16, 32, 64, 128)
    score_threshold: float = 0.05
    threshold_with_centerness: bool = False
    per_level: int = 1000
    nms_iou: float = 0.6
    per_image: int = 100

    def __call__(self, outputs: HeadOutputs) -> list[Detections]:
        """Return the detections of every image, best first.

        Each is a dict: boxes (k, 4), x0 y0 x1 y1 in pixels of the padded image, not clipped;
        scores (k,), the root of score times centre-ness; classes (k,), int64.
        """
        shapes = [(level.shape[2], level.shape[3]) for level in outputs.logits]
        dtype, device = outputs.distances[0].dtype, outputs.distances[0].device
        dtype = torch.promote_types(dtype, torch.float32)
        levels = []
        for shape, stride, logits, distances, centerness in zip(
            shapes, self.strides, *outputs, strict=True
        ):
            x, y, _ = locate([shape], [stride], dtype=dtype, device=device)
            sides = distances.to(dtype).flatten(2).mul(stride).unbind(dim=1)
            boxes = torch.stack((x - sides[0], y - sides[1], x + sides[2], y + sides[3]), dim=2)
            levels.append(self._best(logits.to(dtype), centerness.to(dtype), boxes))
        boxes, scores, classes = (torch.cat(part, dim=1) for part in zip(*levels, strict=True))
        return [self._suppress(*image) for image in zip(boxes, scores, classes, strict=True)]

    def _best(
        self, logits: Tensor, centerness: Tensor, boxes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the k best of one level: boxes (n, k, 4), scores (n, k), classes (n, k).

        Those that do not pass the threshold have score 0: with fixed shapes a GPU need not
        report a count first.
        """
        cells = boxes.shape[1]
        scores = logits.sigmoid()
        joint = scores * centerness.sigmoid()
        passing = (joint if self.threshold_with_centerness else scores) > self.score_threshold
        joint = torch.where(passing, joint, 0).flatten(1)
        best, index = joint.topk(min(self.per_level, joint.shape[1]), dim=1)
        cell = (index % cells)[:, :, None].expand(-1, -1, 4)
        return boxes.gather(1, cell), best.sqrt_(), index // cells

    def _suppress(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> Detections:
        passing = scores > 0
        boxes, scores, classes = boxes[passing], scores[passing], classes[passing]
        kept = batched_nms(boxes, scores, classes, self.nms_iou)[: self.per_image]
        return {"boxes": boxes[kept], "scores": scores[kept], "classes": classes[kept]}


def rescale(
    detections: Detections, size: Sequence[int], original_size: Sequence[int]
) -> Detections:
    """Return detections in pixels of the original image, clipped to it, without empty boxes.

    The given ones are in pixels of the image that the model saw, whose height and width without
    padding is ``size``.
    """
    height, width = original_size
    factors = (width / size[1], height / size[0])
    boxes = detections["boxes"] * detections["boxes"].new_tensor(factors * 2)
    boxes = boxes.clamp(min=0).minimum(boxes.new_tensor((width, height) * 2))
    kept = (boxes[:, 0] < boxes[:, 2]) & (boxes[:, 1] < boxes[:, 3])
    return {**{key: value[kept] for key, value in detections.items()}, "boxes": boxes[kept]}
