from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meta_fcos.fused import frozen_conv2d, norm_relu_conv2d


@pytest.fixture(params=[torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def x(request):
    torch.manual_seed(0)
    x = torch.randn(2, 32, 5, 6, dtype=torch.float64).contiguous(memory_format=request.param)
    return x.requires_grad_()


def gradients(y, operands):
    return torch.autograd.grad((y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), operands)


@pytest.mark.parametrize(("kernel", "stride"), [(1, 1), (1, 2), (3, 1), (3, 2), (7, 2)])
def test_frozen_conv_is_a_convolution_then_scale_and_shift(x, kernel, stride):
    weight = torch.randn(4, 32, kernel, kernel, dtype=torch.float64, requires_grad=True)
    scale, shift = torch.randn(2, 4, dtype=torch.float64)
    plain = F.conv2d(x, weight, stride=stride, padding=kernel // 2)
    plain = plain * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)

    y = frozen_conv2d(x, weight, scale, shift, (stride, stride))

    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(gradients(y, (x, weight)), gradients(plain, (x, weight)))
    with torch.no_grad():
        torch.testing.assert_close(frozen_conv2d(x, weight, scale, shift, (stride, stride)), y)


def test_frozen_conv_gives_no_gradient_to_a_fixed_operand(x):
    weight = torch.randn(4, 32, 1, 1, dtype=torch.float64)
    one, zero = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    frozen_conv2d(x, weight, one, zero, (1, 1)).sum().backward()
    assert x.grad is not None
    weight.requires_grad_()
    frozen_conv2d(x.detach(), weight, one, zero, (1, 1)).sum().backward()
    assert weight.grad is not None


@pytest.mark.parametrize("kernel", [1, 3])
def test_norm_relu_conv_is_the_three_modules(x, kernel):
    norm = nn.GroupNorm(8, 32).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    conv = nn.Conv2d(32, 5, kernel, padding=kernel // 2).double()
    operands = (x, norm.weight, norm.bias, conv.weight, conv.bias)
    plain = conv(F.relu(norm(x)))

    y = norm_relu_conv2d(x, norm, conv.weight, conv.bias)

    torch.testing.assert_close(y, plain)
    torch.testing.assert_close(gradients(y, operands), gradients(plain, operands))
    with torch.no_grad():
        torch.testing.assert_close(norm_relu_conv2d(x, norm, conv.weight, conv.bias), y)


def test_only_the_input_is_kept_for_the_backward_pass(x):
    norm, conv = nn.GroupNorm(8, 32).double(), nn.Conv2d(32, 64, 3, padding=1).double()
    one, zero = torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        norm_relu_conv2d(x, norm, conv.weight, conv.bias)
        frozen_conv2d(x, conv.weight, one, zero, (1, 1))
    parameters = {t.data_ptr() for t in (norm.weight, norm.bias, conv.weight, one)}
    activations = [t for t in kept if t.data_ptr() not in parameters]
    assert [t.data_ptr() for t in activations] == [x.data_ptr()] * 2


def test_autocast_reaches_both(x):
    norm, conv = nn.GroupNorm(8, 32), nn.Conv2d(32, 4, 3, padding=1)
    x = x.detach().float().requires_grad_()
    operands = (x, norm.weight, norm.bias, conv.weight, conv.bias)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = conv(F.relu(norm(x.bfloat16())))
        y = norm_relu_conv2d(x, norm, conv.weight, conv.bias)
        frozen = frozen_conv2d(x, conv.weight, torch.ones(4), torch.zeros(4), (1, 1))
    assert y.dtype == frozen.dtype == torch.bfloat16
    torch.testing.assert_close(y, plain)
    for got, expected in zip(gradients(y, operands), gradients(plain, operands), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
    (weight_gradient,) = torch.autograd.grad(frozen.float().sum(), conv.weight)
    assert weight_gradient.dtype == torch.float32
