"""CUDA tensors without CUDA: of shapes and devices alone, which raise where a CPU's meets one.

torch's fake tensors do the work. What asks for a driver is replaced: the backward pass, which
leaves gradients of zero, streams and random states.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock, patch

import pytest
import torch
from torch import Tensor, nn

from d2scale.step.private_torch import FakeTensorMode, TorchDispatchMode


class KnownValues(TorchDispatchMode):
    """Answers what depends on values: two entries pass every mask, and every number is one."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        if name == "aten::nonzero":
            return args[0].new_zeros((2, args[0].dim()), dtype=torch.int64)
        if name == "aten::_local_scalar_dense":
            return 1 if not args[0].is_floating_point() else 1.0
        if name == "aten::equal":
            torch.add(*args[:2])  # on one device
            return True
        if name == "aten::index.Tensor":
            args = (args[0], [_whole_numbers(index) for index in args[1]], *args[2:])
        if name == "torchvision::nms":
            torch.add(args[0][:, 0], args[1])  # on one device
            return args[1].new_zeros(2, dtype=torch.int64)
        return func(*args, **(kwargs or {}))


def _whole_numbers(index: Tensor | None) -> Tensor | None:
    if index is None or index.dtype is not torch.bool:
        return index
    return index.new_zeros(2, dtype=torch.int64)


class Backward:
    """Stands in for the backward pass: gradients of zero for what trains."""

    model: nn.Module

    def __call__(self, objective: Tensor) -> None:
        assert objective.device.type == "cuda"
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter, requires_grad=False)


def move_to_fake_cuda(module: nn.Module) -> None:
    """What ``module.to("cuda")`` does: parameters and buffers move, other tensors stay."""
    for owner in module.modules():
        for name, parameter in list(owner.named_parameters(recurse=False)):
            moved = _moved(parameter)
            setattr(owner, name, nn.Parameter(moved, parameter.requires_grad))
        for name, buffer in list(owner.named_buffers(recurse=False)):
            setattr(owner, name, _moved(buffer))


def _moved(tensor: Tensor) -> Tensor:
    # Not empty_like: of a number torch would make a real one.
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")


@contextmanager
def fake_cuda() -> Iterator[Backward]:
    """Within the context, tensors on ``cuda`` are fake, and so are those made on a CPU.

    What is given back stands in for the backward pass of the model that it is told.
    """
    backward = Backward()
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        KnownValues(),
        torch.no_grad(),
        patch.object(Tensor, "backward", lambda objective: backward(objective)),
        patch.object(Tensor, "pin_memory", lambda tensor: tensor),
        patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        patch.multiple(
            torch.cuda,
            Stream=MagicMock(),
            current_stream=MagicMock(),
            current_device=lambda: 0,
            stream=lambda _: nullcontext(),
            get_rng_state=lambda _: torch.get_rng_state(),
            set_rng_state=lambda *_: None,
            memory_stats=lambda _: {},
        ),
    ):
        yield backward


def skip_without_fake_cuda() -> None:
    """Skip where torch cannot do without a driver, as it cannot before 2.11 or so."""
    try:
        with FakeTensorMode():
            torch.zeros(2).to("cuda").mul_(2)
    except Exception as error:
        if torch.cuda.is_available():
            raise
        pytest.skip(f"fake tensors of torch {torch.__version__} need a driver: {error!r:.80}")
