"""The dense head, shared by all pyramid levels: class scores, box distances, centre-ness."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meta_fcos.fused import norm_relu_conv2d
from meta_fcos.layers import GROUPS


class HeadOutputs(NamedTuple):
    """The outputs of the head, one tensor a level, from fine to coarse."""

    logits: list[Tensor]  # (n, classes, h, w), of the class scores
    # (n, 4, h, w), from a location to the left, top, right and bottom side of its box, in strides
    # of the level, not negative.
    distances: list[Tensor]
    centerness: list[Tensor]  # (n, 1, h, w), logits


class Scale(nn.Module):
    """A learned number."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))


class FCOSHead(nn.Module):
    """FCOS's head (arXiv 2006.09214).

    Args:
        in_channels: of every level, a multiple of 32.
        num_cls_convs: 3x3 convolutions in the class tower.
        num_box_convs: 3x3 convolutions in the box tower.
        cls_logits_kernel: kernel of the class tower's last convolution, odd.
        use_scale: multiply the distances of each level by a learned number.
        prior_prob: score of every class and location before training.
    """

    def __init__(
        self,
        in_channels: int = 256,
        num_classes: int = 80,
        num_levels: int = 5,
        *,
        num_cls_convs: int = 4,
        num_box_convs: int = 4,
        cls_logits_kernel: int = 1,
        use_scale: bool = True,
        prior_prob: float = 0.01,
    ) -> None:
        super().__init__()
        # Activation checkpointing: keep the input of a tower, compute the rest again.
        self.recompute_towers = False
        self.cls_tower = _tower(in_channels, num_cls_convs)
        self.bbox_tower = _tower(in_channels, num_box_convs)
        self.cls_logits = _conv(in_channels, num_classes, cls_logits_kernel)
        self.bbox_pred = _conv(in_channels, 4, 3)
        self.ctrness = _conv(in_channels, 1, 3)
        self.scales = nn.ModuleList([Scale() for _ in range(num_levels if use_scale else 0)])
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                nn.init.zeros_(cast("Tensor", module.bias))
        nn.init.constant_(cast("Tensor", self.cls_logits.bias), -math.log(1 / prior_prob - 1))

    def forward(self, features: Sequence[Tensor]) -> HeadOutputs:
        """Map the levels' features, (n, in_channels, h, w) each, from fine to coarse."""
        classes = (self.cls_logits.weight, cast("Tensor", self.cls_logits.bias))
        # One convolution for both outputs of the box tower reads it once.
        weight = torch.cat((self.bbox_pred.weight, self.ctrness.weight))
        bias = torch.cat([cast("Tensor", conv.bias) for conv in (self.bbox_pred, self.ctrness)])
        run = _run_again if self.recompute_towers and torch.is_grad_enabled() else _run
        outputs = HeadOutputs([], [], [])
        for level, feature in enumerate(features):
            outputs.logits.append(run(self.cls_tower, feature, *classes))
            distances, centerness = run(self.bbox_tower, feature, weight, bias).split((4, 1), dim=1)
            if self.scales:
                distances = distances * cast("Scale", self.scales[level]).scale
            outputs.distances.append(F.relu(distances))
            outputs.centerness.append(centerness)
        return outputs


def _run_again(*args: Any) -> Tensor:
    """As ``_run``, now and once more in the backward pass."""
    return checkpoint(_run, *args, use_reentrant=False, preserve_rng_state=False)


def _conv(in_channels: int, out_channels: int, kernel_size: int) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)


def _tower(channels: int, convs: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(convs):
        layers += [_conv(channels, channels, 3), nn.GroupNorm(GROUPS, channels), nn.ReLU()]
    return nn.Sequential(*layers)


def _run(tower: nn.Sequential, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Apply a tower and a last convolution, each convolution with the norm and ReLU before it."""
    # The tower's own modules hold the parameters and are not called.
    convs = [(layer.weight, layer.bias) for layer in tower if isinstance(layer, nn.Conv2d)]
    norms = [layer for layer in tower if isinstance(layer, nn.GroupNorm)]
    (first_weight, first_bias), *rest = [*convs, (weight, bias)]
    x = F.conv2d(x, first_weight, first_bias, padding=first_weight.shape[-1] // 2)
    for norm, (next_weight, next_bias) in zip(norms, rest, strict=True):
        x = norm_relu_conv2d(x, norm, next_weight, next_bias)
    return x
