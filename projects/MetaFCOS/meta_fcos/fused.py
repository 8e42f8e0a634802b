"""Convolutions joined with their normalization: fewer passes over, and copies of, activations.

Each function equals the plain modules up to rounding. They save memory in training; without
gradients, and under torch.compile which fuses by itself, plain operators run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

Pair = tuple[int, ...]


def frozen_conv2d(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: Pair) -> Tensor:
    """Convolve, then scale and shift every channel by constants, in one convolution.

    For the backward pass only ``x`` is kept; the scaled weight is computed again there. ``x`` is
    (n, c, h, w), ``weight`` (d, c, k, k) with odd k, ``scale`` and ``shift`` are (d,) and get no
    gradient. Zeros around ``x`` keep its size, up to the stride.
    """
    x = _autocast(x)
    convolve = _FrozenConv2d.apply if _fuse() else _frozen_conv2d
    return convolve(x, weight, scale, shift, stride)


def norm_relu_conv2d(x: Tensor, norm: nn.GroupNorm, weight: Tensor, bias: Tensor) -> Tensor:
    """Normalize, apply ReLU and convolve, with stride 1 and zeros around that keep the size.

    For the backward pass only ``x`` is kept: the convolution's input is computed again there,
    which halves the memory of a tower of such layers at a few per cent of its time. ``x`` is
    (n, c, h, w), not yet normalized, ``weight`` (d, c, k, k) with odd k, ``bias`` (d,).
    """
    x = _autocast(x)
    convolve = _NormReluConv2d.apply if _fuse() else _norm_relu_conv2d
    return convolve(x, norm.weight, norm.bias, weight, bias, norm.num_groups, norm.eps)


def _frozen_conv2d(x: Tensor, weight: Tensor, scale: Tensor, shift: Tensor, stride: Pair) -> Tensor:
    return F.conv2d(x, _scaled(weight, scale, x), shift.to(x.dtype), stride, _padding(weight))


class _FrozenConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, weight, scale, _, ctx.stride = operands
        ctx.save_for_backward(x, weight, scale)
        return _frozen_conv2d(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        wanted = (*ctx.needs_input_grad[:2], False)
        scaled = _scaled(weight, scale, x)
        grad_x, grad_weight, _ = _conv2d_gradients(grad, x, scaled, ctx.stride, wanted)
        if wanted[1]:
            grad_weight = grad_weight.to(weight.dtype).mul_(scale.view(-1, 1, 1, 1))
        return grad_x, grad_weight, None, None, None


def _norm_relu_conv2d(
    x: Tensor, scale: Tensor, shift: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float
) -> Tensor:
    x = _norm_relu(x, scale, shift, groups, eps)
    return F.conv2d(x, weight.to(x.dtype), bias.to(x.dtype), padding=_padding(weight))


class _NormReluConv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *operands: Any) -> Tensor:
        x, scale, shift, weight, _, ctx.groups, ctx.eps = operands
        ctx.save_for_backward(x, scale, shift, weight)
        return _norm_relu_conv2d(*operands)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, shift, weight = ctx.saved_tensors
        with torch.enable_grad():
            x, scale, shift = (t.detach().requires_grad_() for t in (x, scale, shift))
            active = _norm_relu(x, scale, shift, ctx.groups, ctx.eps)
        grad_active, grad_weight, grad_bias = _conv2d_gradients(
            grad, active.detach(), weight.to(x.dtype), (1, 1), (True, True, True)
        )
        gradients = torch.autograd.grad(active, (x, scale, shift), grad_active)
        dtype = weight.dtype
        return *gradients, grad_weight.to(dtype), grad_bias.to(dtype), None, None


def _fuse() -> bool:
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


def _autocast(x: Tensor) -> Tensor:
    """Cast a convolution's input as autocast would, which does not see inside our functions."""
    if x.dtype is torch.float32 and torch.is_autocast_enabled(x.device.type):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def _scaled(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    return (weight * scale.view(-1, 1, 1, 1)).to(x.dtype)


def _norm_relu(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    # In the parameters' precision, as autocast would do it. torch.group_norm, not F's: that one
    # refuses groups of a single value, but only where the batch is a single image.
    normed = torch.group_norm(x.to(scale.dtype), groups, scale, shift, eps)
    return F.relu_(normed).to(x.dtype)


def _padding(weight: Tensor) -> Pair:
    return (weight.shape[2] // 2, weight.shape[3] // 2)


def _conv2d_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, stride: Pair, wanted: tuple[bool, ...]
) -> tuple[Any, Any, Any]:
    """Return the gradients of a convolution's input, weight and bias; None where not wanted."""
    return torch.ops.aten.convolution_backward(
        grad, x, weight, weight.shape[:1], stride, _padding(weight), (1, 1), False, (0, 0), 1,
        wanted,
    )  # fmt: skip
