"""What d2scale uses of torch that torch does not promise to keep, in one place.

Tried on torch 2.4, 2.5, 2.9 and 2.15; ``tests/step/test_private_torch.py`` says what it relies on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch.amp.grad_scaler import GradScaler
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
from torch.utils._pytree import tree_leaves as tree_leaves
from torch.utils._pytree import tree_map_only as tree_map_only

# Base class of all batch norm layers.
BATCH_NORM = _BatchNorm

# What operations raise whose results depend on values, or that have no rule for fake tensors.
NOT_FAKEABLE = (
    DataDependentOutputException,
    DynamicOutputShapeException,
    UnsupportedOperatorException,
)


def share_tensors(module: nn.Module, source: nn.Module) -> None:
    """Let ``module`` have the very parameters and buffers of ``source``."""
    module._parameters, module._buffers = source._parameters, source._buffers


def storage_key(tensor: Tensor) -> int:
    """Return a number that tensors share exactly if they share their storage."""
    return int(tensor.untyped_storage()._cdata)


def norms_of(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the 2-norm of each tensor; on a GPU in a few kernels for all of them."""
    return list(torch._foreach_norm(list(tensors))) if tensors else []


def run_backward(scalar: Tensor) -> None:
    """Run autograd's engine from ``scalar`` to the leaves, without torch's functions around it."""
    engine: Any = torch.autograd.Variable._execution_engine
    arguments = ((scalar,), (torch.ones_like(scalar),), False, False, ())
    engine.run_backward(*arguments, allow_unreachable=True, accumulate_grad=True)


def buffer_owner(model: nn.Module, name: str) -> tuple[dict[str, Tensor | None], str]:
    """Return the mapping that holds a buffer of ``model``, and the buffer's name in it."""
    owner, _, own_name = name.rpartition(".")
    return model.get_submodule(owner)._buffers, own_name


def copy_all(pairs: Sequence[tuple[Tensor, Tensor]], *, asynchronous: bool = False) -> None:
    """Copy into the first tensor of each pair the second; on a GPU in few kernels for all."""
    kinds: dict[Any, tuple[list[Tensor], list[Tensor]]] = {}
    for target, source in pairs:
        kind = target.dtype, target.device, source.dtype, source.device  # else one by one
        targets, sources = kinds.setdefault(kind, ([], []))
        targets.append(target)
        sources.append(source)
    for targets, sources in kinds.values():
        torch._foreach_copy_(targets, sources, asynchronous)


def scaler_values(scaler: GradScaler) -> list[Tensor]:
    """Return a scaler's scale and its steps since that has changed, which lie on its device.

    Its state dict would read them, and wait. A scaler that is switched off has none.
    """
    if not scaler.is_enabled():
        return []
    scaler.scale(torch.zeros((), device=scaler._device))  # they come into being at the first use
    values: list[Any] = [scaler._scale, scaler._growth_tracker]
    return values
