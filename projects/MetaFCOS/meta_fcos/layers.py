"""Convolution and normalization as ResNet and FPN use them, with detectron2's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from meta_fcos.fused import frozen_conv2d

GROUPS = 32  # of every GroupNorm


def identity_frozen_norm(channels: int) -> FrozenBatchNorm2d:
    """Return a frozen batch norm that changes nothing until weights are loaded.

    The variance is 1 - eps, as in detectron2: checkpoints that hold only scale and shift are
    exact with it.
    """
    norm = FrozenBatchNorm2d(channels)
    norm.running_var -= norm.eps
    return norm


NORMS: dict[str, Callable[[int], nn.Module | None]] = {
    "": lambda channels: None,
    "FrozenBN": identity_frozen_norm,
    "BN": nn.BatchNorm2d,
    "GN": partial(nn.GroupNorm, GROUPS),
}


class ConvNorm(nn.Conv2d):
    """A convolution that keeps the size (up to its stride), then a norm of :data:`NORMS`."""

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
        self.norm = NORMS[norm](out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        if isinstance(self.norm, FrozenBatchNorm2d) and self.bias is None:
            scale = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
            shift = self.norm.bias - self.norm.running_mean * scale
            return frozen_conv2d(x, self.weight, scale, shift, self.stride)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return x if self.norm is None else self.norm(x)


def freeze(module: nn.Module) -> None:
    """Stop training the parameters of ``module``, and freeze its batch norms, in place."""
    for parameter in module.parameters():
        parameter.requires_grad = False
    for child in list(module.modules()):
        if isinstance(child, ConvNorm) and isinstance(child.norm, nn.BatchNorm2d):
            frozen = FrozenBatchNorm2d(child.norm.num_features, eps=child.norm.eps)
            frozen.load_state_dict(child.norm.state_dict())
            child.norm = frozen
