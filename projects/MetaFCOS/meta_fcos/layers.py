"""Convolution and normalization as ResNet and FPN use them, with detectron2's parameter names."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from meta_fcos.fused import frozen_conv2d

NORMS = ("FrozenBN", "BN", "GN")
GROUPS = 32  # of every GroupNorm


def build_norm(name: str, channels: int) -> nn.Module | None:
    """Return the normalization layer called ``name``; None for the empty name."""
    if name == "":
        return None
    if name == "FrozenBN":
        return identity_frozen_norm(channels)
    if name == "BN":
        return nn.BatchNorm2d(channels)
    if name == "GN":
        return nn.GroupNorm(GROUPS, channels)
    raise ValueError(f"norm {name!r}; allowed: {', '.join(NORMS)} or the empty string")


def identity_frozen_norm(channels: int) -> FrozenBatchNorm2d:
    """Return a frozen batch norm that changes nothing until weights are loaded.

    The variance is 1 - eps, as in detectron2: checkpoints that hold only scale and shift are
    exact with it.
    """
    norm = FrozenBatchNorm2d(channels)
    norm.running_var -= norm.eps
    return norm


class ConvNorm(nn.Conv2d):
    """A convolution that keeps the size (up to its stride), then a normalization ``norm``."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        bias: bool = False,
        norm: str = "",
    ) -> None:
        super().__init__(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias
        )
        self.norm = build_norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        if isinstance(self.norm, FrozenBatchNorm2d) and self.bias is None:
            scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
            shift = self.norm.bias - self.norm.running_mean * scale
            return frozen_conv2d(x, self.weight, scale, shift, self.stride)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return x if self.norm is None else self.norm(x)


def freeze(module: nn.Module) -> None:
    """Fix all parameters of ``module``, and turn its batch norms into frozen ones, in place."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    for child in list(module.modules()):
        if isinstance(child, ConvNorm) and isinstance(child.norm, nn.BatchNorm2d):
            child.norm = _frozen_copy(child.norm)


def _frozen_copy(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    with torch.no_grad():
        for name, value in frozen.named_buffers():
            value.copy_(getattr(norm, name))
    return frozen
