"""detectron2 in float64: the places where it computes in float32 whatever the model, or fails.

For comparisons only. Boxes stay float32, as detectron2's class for them is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def losses_in_float64() -> Iterator[None]:
    """Within the context, let detectron2's models compute their losses in their own precision."""
    import torchvision

    suppress = torchvision.ops.boxes.batched_nms
    cross_entropy, to_float32 = F.binary_cross_entropy_with_logits, Tensor.float

    def batched_nms(boxes: Tensor, scores: Tensor, *arguments: Any) -> Tensor:
        # detectron2 makes the boxes float32 and leaves the scores, and then torchvision refuses.
        return suppress(boxes, scores.to(boxes.dtype), *arguments)

    def binary_cross_entropy(inputs: Tensor, targets: Tensor, *rest: Any, **options: Any) -> Tensor:
        # By a float32 target torch makes it float32.
        return cross_entropy(inputs, targets.to(inputs.dtype), *rest, **options)

    def at_least_float32(self: Tensor) -> Tensor:
        return self if self.dtype == torch.float64 else to_float32(self)

    modules = "detectron2.modeling.meta_arch."
    with (
        mock.patch("torchvision.ops.boxes.batched_nms", batched_nms),
        mock.patch(f"{modules}retinanet.sigmoid_focal_loss_jit", focal_loss),
        mock.patch(f"{modules}fcos.sigmoid_focal_loss_jit", focal_loss),
        mock.patch("torch.nn.functional.binary_cross_entropy_with_logits", binary_cross_entropy),
        mock.patch.object(Tensor, "float", at_least_float32),
    ):
        yield


def focal_loss(
    inputs: Tensor, targets: Tensor, alpha: float, gamma: float, reduction: str
) -> Tensor:
    """Return fvcore's sigmoid_focal_loss, a sum, in the precision of ``inputs``; its is float32."""
    assert reduction == "sum"
    probability = inputs.sigmoid()
    loss = F.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
    right = probability * targets + (1 - probability) * (1 - targets)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return (balance * loss * (1 - right) ** gamma).sum()
