from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from meta_fcos.layers import ConvNorm


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


def frozen(seed=0):
    torch.manual_seed(seed)
    layer = ConvNorm(4, 8, 3, norm="FrozenBN")
    for buffer in layer.norm.buffers():
        torch.nn.init.uniform_(buffer, 0.5, 1.5)
    return layer


def test_the_constants_of_a_frozen_norm_are_computed_once():
    layer, x = frozen(), torch.rand(2, 4, 8, 8)
    layer(x)
    with Operations() as operations:
        layer(x).sum().backward()
    assert "aten::rsqrt" not in operations.names


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.norm.running_mean.add_(1),
        lambda layer: layer.norm.load_state_dict(frozen(seed=1).norm.state_dict()),
        lambda layer: setattr(layer.norm, "weight", torch.full((8,), 3.0)),
        lambda layer: layer.double(),
    ],
    ids=["in place", "loaded", "another tensor", "another precision"],
)
def test_they_follow_what_happens_to_the_norm(change):
    layer, x = frozen(), torch.rand(2, 4, 8, 8)
    with torch.no_grad():
        layer(x)
        change(layer)
        x = x.to(layer.weight.dtype)
        fresh = frozen().to(layer.weight.dtype)
        fresh.norm.load_state_dict(layer.norm.state_dict())
        torch.testing.assert_close(layer(x), fresh(x), rtol=0, atol=0)


def test_a_layer_that_was_evaluated_in_inference_mode_trains():
    layer, x = frozen(), torch.rand(2, 4, 8, 8)
    with torch.inference_mode():
        layer(x)
    layer(x).sum().backward()
    assert layer.weight.grad.abs().sum() > 0
