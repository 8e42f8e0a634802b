"""Convolution and normalization as ResNet and FPN use them, with detectron2's parameter names."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
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


class _NormConstants:
    """Scale and shift of a frozen batch norm, computed again only where its buffers change."""

    def __init__(self) -> None:
        self._buffers: tuple[Tensor, ...] = ()  # kept, so that no other gets their number
        self._state: list[tuple[int, int]] = []
        self._constants: tuple[Tensor, Tensor] | None = None

    def __call__(self, norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
        """Return the two, each (channels,)."""
        if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
            return _constants(norm)  # what is made in inference mode cannot be trained with
        buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        state = [(id(buffer), buffer._version) for buffer in buffers]
        if self._constants is None or state != self._state:
            self._buffers, self._state, self._constants = buffers, state, _constants(norm)
        return self._constants


def _constants(norm: FrozenBatchNorm2d) -> tuple[Tensor, Tensor]:
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    return scale, norm.bias - norm.running_mean * scale


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
        self._constants_of = _NormConstants()

    def forward(self, x: Tensor) -> Tensor:
        """Map (n, in_channels, h, w) to (n, out_channels, h / stride, w / stride)."""
        if isinstance(self.norm, FrozenBatchNorm2d) and self.bias is None:
            return frozen_conv2d(x, self.weight, *self._constants_of(self.norm), self.stride)
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
