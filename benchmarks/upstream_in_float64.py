"""detectron2 in float64: the places where it computes in float32 whatever the model, or fails.

For comparisons only. Boxes stay float32, as detectron2's class for them is.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from torch import Tensor
from torch.nn import functional as F


@contextmanager
def losses_in_float64() -> Iterator[None]:
    """Within the context, let detectron2's models compute their losses in their own precision."""
    import torchvision
    from detectron2.modeling.meta_arch.fcos import FCOS

    suppress, centerness = torchvision.ops.boxes.batched_nms, FCOS.compute_ctrness_targets

    def batched_nms(boxes: Tensor, scores: Tensor, *arguments: Any) -> Tensor:
        # detectron2 makes the boxes float32 and leaves the scores, and then torchvision refuses.
        return suppress(boxes, scores.to(boxes.dtype), *arguments)

    def targets(self: Any, *arguments: Any) -> Tensor:
        # A float32 target makes torch's binary cross entropy float32.
        return centerness(self, *arguments).double()

    modules = "detectron2.modeling.meta_arch."
    with (
        mock.patch("torchvision.ops.boxes.batched_nms", batched_nms),
        mock.patch(f"{modules}retinanet.sigmoid_focal_loss_jit", focal_loss),
        mock.patch(f"{modules}fcos.sigmoid_focal_loss_jit", focal_loss),
        mock.patch.object(FCOS, "compute_ctrness_targets", targets),
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
