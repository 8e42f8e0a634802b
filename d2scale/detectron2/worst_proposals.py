"""The most memory that a two-stage detector's proposals can take, while memory is measured.

Heads of masks, keypoints and boxes see a sample of an image's proposals. With random weights
hardly any proposal lies on an instance, late in a training as many as a sample may hold. So while
memory is counted or measured, each image gets that many, and enough others to fill its sample.
"""

from __future__ import annotations

from typing import Any

import torch
from detectron2.modeling.roi_heads import ROIHeads
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn


def give_most_foreground(model: nn.Module) -> None:
    """Let the heads of ``model`` see as many foreground proposals as they can sample."""
    for module in model.modules():
        if isinstance(module, ROIHeads):
            module.register_forward_pre_hook(_replace_proposals)


def _replace_proposals(heads: Any, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Replace the proposals in (images, features, proposals, targets) of a training step."""
    if not heads.training or len(inputs) < 4:
        return None
    images, features, proposals, targets = inputs
    sampled = heads.batch_size_per_image
    foreground = int(sampled * heads.positive_fraction)
    replaced = [
        _with_foreground(own, target, foreground, sampled)
        for own, target in zip(proposals, targets, strict=True)
    ]
    return images, features, replaced, targets


def _with_foreground(
    proposals: Instances, target: Instances, foreground: int, sampled: int
) -> Instances:
    """Return as many proposals, or what a sample needs, the first on instances of ``target``."""
    boxes = _boxes_of_heads(target)
    if not len(boxes) or type(proposals.proposal_boxes) is not Boxes:
        return proposals
    on_instances = boxes.repeat(-(-foreground // len(boxes)), 1)[:foreground]
    beside = proposals.proposal_boxes.tensor[: max(len(proposals), sampled) - foreground]
    # Random weights may leave fewer proposals than a sample has: more, that lie on nothing.
    corner = beside.new_tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(sampled, 1)
    replaced = Instances(proposals.image_size)
    replaced.proposal_boxes = Boxes(torch.cat((on_instances.to(beside), beside, corner)))
    logits = proposals.objectness_logits.new_zeros(len(replaced.proposal_boxes))
    replaced.objectness_logits = logits
    return replaced


def _boxes_of_heads(target: Instances) -> Tensor:
    """Return the boxes (n, 4) that all heads learn from: those with visible keypoints, if any."""
    boxes: Tensor = target.gt_boxes.tensor
    if not target.has("gt_keypoints"):
        return boxes
    visible = (target.gt_keypoints.tensor[..., 2] > 0).any(dim=1)
    return boxes[visible] if visible.any() else boxes
