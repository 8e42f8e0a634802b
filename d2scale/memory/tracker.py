"""Counting the bytes that tensors hold, operation by operation, on any machine.

A dispatch mode sees every tensor that an operation returns, fake or real. It counts each storage
once, from the operation that allocated it until it is freed, so views cost nothing and what
autograd saves counts for as long as autograd keeps it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from d2scale.memory.stream import WORKSPACE, Allocation, Trace
from d2scale.step.out_of_memory import OutOfMemoryError
from d2scale.step.private_torch import TorchDispatchMode, storage_key, tree_leaves

_OTHER = "other"
_CONVOLUTIONS = ("aten::convolution", "aten::convolution_backward")


@dataclass(eq=False)
class _Live:
    """A storage that is counted now."""

    allocation: Allocation
    # Its callback is called when the storage is freed.
    watch: weakref.ref[Any] | None = field(default=None, repr=False)


class StorageTracker(TorchDispatchMode):
    """Counts the storages that operations allocate while it is active, until they are freed.

    Inside ``FakeTensorMode`` that takes no memory and hardly any time; otherwise it counts a
    real step. Storages on the ``meta`` device are not counted.

    Args:
        budget_bytes: most bytes that may be allocated; an operation that goes beyond it raises
            torch's own out-of-memory error, as a full device does. None: no limit.
        workspace_part: what a convolution takes besides while it runs, as a part of the bytes of
            its input, weight and output; only traces know of it.

    Attributes:
        live_bytes: bytes allocated now.
        peak_bytes: the most so far, or since :meth:`reset_peak`.
    """

    def __init__(self, budget_bytes: int | None = None, workspace_part: float = 0.0) -> None:
        super().__init__()
        self.budget_bytes = budget_bytes
        self.workspace_part = workspace_part
        self.live_bytes = 0
        self.peak_bytes = 0
        self._phase = _OTHER
        self._live: dict[int, _Live] = {}
        self._trace: Trace | None = None

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Name the part of a step that the operations inside belong to."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    @contextmanager
    def recording(self) -> Iterator[Trace]:
        """Record what is allocated and freed inside, and what is allocated already."""
        trace = Trace([live.allocation for live in self._live.values()])
        before, self._trace = self._trace, trace
        try:
            yield trace
        finally:
            self._trace = before

    def count(self, *tensors: Tensor) -> None:
        """Count tensors that were allocated before, whatever the budget."""
        budget, self.budget_bytes = self.budget_bytes, None
        for tensor in tensors:
            self._see(tensor, "given")
        self.budget_bytes = budget

    def reset_peak(self) -> None:
        """Let the peak start from what is allocated now."""
        self.peak_bytes = self.live_bytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        outputs = func(*args, **(kwargs or {}))
        operation = func.name().partition(".")[0]
        for leaf in tree_leaves(outputs):
            if isinstance(leaf, Tensor):
                self._see(leaf, operation)
        if self._trace is not None and self.workspace_part and operation in _CONVOLUTIONS:
            # The gradient of the output, the input and the weight; forwards, input and weight.
            operands = args[:3] if operation.endswith("backward") else (*args[:2], outputs)
            self._trace_workspace(operands)
        return outputs

    def _trace_workspace(self, operands: tuple[Tensor, ...]) -> None:
        assert self._trace is not None
        nbytes = round(self.workspace_part * sum(tensor.nbytes for tensor in operands))
        shape = tuple(operands[-1].shape[1:])
        workspace = Allocation(WORKSPACE, shape, WORKSPACE, nbytes)
        self._trace.allocate(workspace)
        self._trace.free(workspace)

    def _see(self, tensor: Tensor, operation: str) -> None:
        if tensor.device.type == "meta" or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        key = storage_key(tensor)
        nbytes = storage.nbytes()
        known = self._live.get(key)
        if known is not None:
            if known.allocation.nbytes == nbytes:
                return
            self._forget(key)  # resized in place: a new request
        self._check_budget(nbytes)
        allocation = Allocation(operation, tuple(tensor.shape[1:]), self._phase, nbytes)
        live = self._live[key] = _Live(allocation)
        live.watch = weakref.ref(storage, lambda _: self._forget(key, live))
        self.live_bytes += nbytes
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        if self._trace is not None:
            self._trace.allocate(allocation)

    def _check_budget(self, nbytes: int) -> None:
        if self.budget_bytes is not None and self.live_bytes + nbytes > self.budget_bytes:
            # In torch's own words, by which other programs recognise it.
            raise OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {nbytes} bytes on a simulated device: "
                f"{self.live_bytes} of {self.budget_bytes} are in use"
            )

    def _forget(self, key: int, expected: _Live | None = None) -> None:
        live = self._live.get(key)
        if live is None or (expected is not None and live is not expected):
            return
        del self._live[key]
        self.live_bytes -= live.allocation.nbytes
        if self._trace is not None:
            self._trace.free(live.allocation)
