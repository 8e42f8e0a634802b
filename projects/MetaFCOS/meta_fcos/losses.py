"""The losses of FCOS over all locations. Positives are masked, so no shape depends on the data."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from meta_fcos.head import HeadOutputs
from meta_fcos.targets import Targets

# The divisors of the losses are never smaller than these; see `finish_normalizers`.
NORMALIZER_MINIMA = {"num_positives": 1.0, "centerness_sum": 1e-6}


def finish_normalizers(totals: Mapping[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """Turn sums over all images of an optimizer step into the divisors of the losses.

    The sums are clamped from below and then divided by the ranks: the mean over ranks of
    gradients is then the gradient of the one big batch, for any number of ranks, even in a step
    with fewer positives than ranks. (Published FCOS code clamps after the division; the two
    differ in such a step only.)
    """
    return {
        name: totals[name].clamp(min=minimum) / world_size
        for name, minimum in NORMALIZER_MINIMA.items()
    }


@dataclass(frozen=True)
class LossRule:
    """The settings of the losses."""

    focal_alpha: float = 0.25  # weight of the positives; negatives have the rest to 1
    focal_gamma: float = 2.0
    box_loss: str = "giou"  # a key of BOX_LOSSES

    def __post_init__(self) -> None:
        if self.box_loss not in BOX_LOSSES:
            raise ValueError(f"box loss {self.box_loss!r}; allowed: {', '.join(BOX_LOSSES)}")

    def __call__(
        self, outputs: HeadOutputs, targets: Targets, normalizers: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Return the three losses, scalars in the targets' precision.

        Without positives the last two are 0, and so are their gradients.
        """
        dtype = targets.distances.dtype
        logits, distances, quality = (
            torch.cat([level.flatten(2) for level in levels], dim=2).to(dtype) for levels in outputs
        )
        positives = normalizers["num_positives"].to(dtype)
        # Infinite predictions for background would make the masked sum nan.
        distances = torch.where(targets.positive[:, None], distances, 1)
        box = (BOX_LOSSES[self.box_loss](distances, targets.distances) * targets.centerness).sum()
        quality_loss = F.binary_cross_entropy_with_logits(
            quality[:, 0], targets.centerness, weight=targets.positive.to(dtype), reduction="sum"
        )
        focal = focal_loss(logits, targets.labels, self.focal_alpha, self.focal_gamma)
        return {
            "loss_fcos_cls": focal / positives,
            "loss_fcos_loc": box / normalizers["centerness_sum"].to(dtype),
            "loss_fcos_ctr": quality_loss / positives,
        }


def focal_loss(logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (arXiv 1708.02002, equation 5), summed over everything.

    It keeps one tensor of the logits' size for the backward pass, and no one-hot targets.
    ``logits`` are (n, classes, l), ``labels`` (n, l), int64: the class, or -1 for background.
    """
    return _FocalLoss.apply(logits, labels, alpha, gamma)


class _FocalLoss(torch.autograd.Function):
    """Computes every class as a negative, then corrects the one that is positive.

    The gradient is computed in the forward pass, from the same parts as the loss.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, alpha: float, gamma: float) -> Tensor:
        index = labels.clamp(min=0)[:, None]
        positive = (labels >= 0)[:, None]
        at_label = logits.gather(1, index)
        loss, gradient = _focal_negative(logits, 1 - alpha, gamma)
        # A positive's loss is a negative's of the opposite logit, but for the weight.
        wrong, wrong_gradient = _focal_negative(at_label, 1 - alpha, gamma)
        right, right_gradient = _focal_negative(-at_label, alpha, gamma)
        correction = torch.where(positive, right - wrong, 0)
        gradient.scatter_add_(1, index, torch.where(positive, -right_gradient - wrong_gradient, 0))
        ctx.save_for_backward(gradient)
        return loss.sum() + correction.sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad, None, None, None


def _focal_negative(logits: Tensor, weight: float, gamma: float) -> tuple[Tensor, Tensor]:
    """Return w * p^g * softplus(x) and its derivative w * p^g * (g * (1 - p) * softplus(x) + p)."""
    probability = logits.sigmoid()
    cross_entropy = F.softplus(logits)
    modulation = probability.pow(gamma).mul_(weight)
    gradient = (1 - probability).mul_(cross_entropy).mul_(gamma).add_(probability)
    return cross_entropy.mul_(modulation), gradient.mul_(modulation)


def _overlap(predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the IoU with one square stride added to both areas, and the union: (n, l) each."""
    left, top, right, bottom = torch.minimum(predicted, target).unbind(dim=1)
    intersection = (left + right) * (top + bottom)
    union = _area(predicted) + _area(target) - intersection
    return (intersection + 1) / (union + 1), union


def _area(distances: Tensor) -> Tensor:
    left, top, right, bottom = distances.unbind(dim=1)
    return (left + right) * (top + bottom)


def _giou(predicted: Tensor, target: Tensor) -> Tensor:
    iou, union = _overlap(predicted, target)
    hull = _area(torch.maximum(predicted, target))
    return 1 - iou + (hull - union) / hull


# From distances (n, 4, l) in strides, of which the target's are positive, to losses (n, l).
BOX_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "giou": _giou,
    "linear_iou": lambda predicted, target: 1 - _overlap(predicted, target)[0],
    "iou": lambda predicted, target: -_overlap(predicted, target)[0].log(),
}
