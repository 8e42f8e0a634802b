"""Adding up gradients over ranks while the backward pass is still running.

DistributedDataParallel does it in buckets that hold a second copy of all gradients, and a rank that
fails in its backward leaves the others waiting inside a reduction. Here two buffers serve all
buckets in turn, and every rank takes part in every reduction, whatever happened to it: only then do
the ranks agree on whether the step counts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2scale.step import ranks
from d2scale.step.private_torch import copy_all
from d2scale.step.waiting import exchange

# Large enough for the network, small beside a model.
BUCKET_BYTES = 16 * 2**20
# While one bucket is being reduced, the next is being filled.
BUFFERS = 2


@dataclass(eq=False)
class _Bucket:
    """Parameters of one dtype on one device whose gradients are reduced together."""

    # In the order in which a backward pass usually reaches them.
    parameters: list[nn.Parameter]
    # Flat tensors that take turns, shared with the other buckets of this kind.
    buffers: deque[Tensor] = field(default_factory=deque)
    # Parameters whose gradient the running backward pass has not completed.
    missing: set[nn.Parameter] = field(default_factory=set)
    started: bool = False  # whether its reduction has begun

    @property
    def numel(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def views(self, buffer: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each gradient and its place in ``buffer``."""
        start = 0
        for parameter in self.parameters:
            part = buffer[start : start + parameter.numel()]
            start += parameter.numel()
            assert parameter.grad is not None
            yield parameter.grad, laid_out(part, parameter)


class GradientAverager:
    """Replaces gradients by their sums over the ranks, which all build one alike.

    Every rank's losses are weighed so that the sum is the step's mean.

    What it needs on the device is allocated here, once: two buffers of 16 MiB, or of the largest
    gradient. On one rank it does nothing. Gradients cross the network in the dtype ``compress``,
    or else in their own.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], compress: torch.dtype | None = None
    ) -> None:
        self.parameters = tuple(parameters)
        # What the losses are weighed by as well, and sums divided by. Half floats are divided
        # once they are that, as DistributedDataParallel does it: small ones would be lost before.
        self.divisor = ranks.world_size() if compress else 1
        self._buckets: list[_Bucket] = []
        self._order: list[_Bucket] = []
        # Reductions that have begun: bucket, its buffer, the handle to wait for.
        self._running: deque[tuple[_Bucket, Tensor, Any]] = deque()
        self.buffers: list[Tensor] = []
        # One number a parameter: ranks that have a gradient; then one a bucket: ranks on which
        # the backward pass did not complete it. Summed over the ranks by the caller.
        self.counts = torch.zeros(0, dtype=torch.int64)
        if ranks.world_size() == 1:
            return
        for (device, dtype), members in by_kind(self.parameters, compress).items():
            buckets = [_Bucket(parameters) for parameters in in_buckets(members)]
            size = max(bucket.numel for bucket in buckets)
            buffers = deque(torch.zeros(size, device=device, dtype=dtype) for _ in range(BUFFERS))
            for bucket in buckets:
                bucket.buffers = buffers
            self._buckets += buckets
            self.buffers += buffers
        self._order = list(self._buckets)
        self.counts = torch.zeros(len(self.parameters) + len(self._buckets), dtype=torch.int64)
        # The first call makes the backend allocate what it needs, while there is memory.
        for buffer in self.buffers:
            dist.all_reduce(buffer)

    @contextmanager
    def taking_part(self, *, joins: bool) -> Iterator[None]:
        """Within the context, a rank that fails leaves no other rank waiting.

        If it ``joins``, it takes part in the reductions that are left, with whatever the buffers
        hold. All ranks must then drop the step.
        """
        for bucket in self._buckets:
            bucket.started = False
        try:
            yield
        except Exception:
            if joins:
                self._complete_all(use=False)
            raise

    @contextmanager
    def last_backward(self) -> Iterator[None]:
        """Within the context, which is the last backward pass, reduce each complete bucket.

        When it ends, all gradients are sums over the ranks, and ``counts`` are this rank's.
        """
        if not self._buckets:
            yield
            return
        hooks = self._add_hooks()
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
        with_gradient = [parameter.grad is not None for parameter in self.parameters]
        late = [not bucket.started for bucket in self._buckets]
        self.counts.copy_(torch.tensor([*with_gradient, *late]))
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self._complete_all(use=True)

    def end_virtual_rank(self) -> None:
        """Do nothing: the gradients of all virtual ranks of a GPU add up by themselves."""

    def finish(self) -> None:
        """Do what is left once the step has succeeded on all ranks and ``counts`` are summed."""
        self._drop_unused()

    def _drop_unused(self) -> None:
        """Take the zeros back that stand for gradients no rank has, once ``counts`` are summed."""
        if not self._buckets:
            return
        used, late = self.counts.split([len(self.parameters), len(self._buckets)])
        for parameter, count in zip(self.parameters, used.tolist(), strict=True):
            if not count:
                parameter.grad = None
        # A bucket with a parameter that is not always used would hold up those behind it. All
        # ranks know the same counts, so all change their order alike.
        waited = dict(zip(self._buckets, late.tolist(), strict=True))
        self._order = sorted(self._buckets, key=lambda bucket: waited[bucket] > 0)

    def _add_hooks(self) -> list[Any]:
        hooks = []
        for bucket in self._buckets:
            bucket.missing, bucket.started = set(bucket.parameters), False
            for parameter in bucket.parameters:
                arrived = partial(self._arrived, bucket)
                hooks.append(parameter.register_post_accumulate_grad_hook(arrived))
        return hooks

    def _arrived(self, bucket: _Bucket, parameter: nn.Parameter) -> None:
        if bucket.started:
            raise RuntimeError(
                "a gradient was completed twice in one backward pass, as reentrant activation "
                "checkpointing does; use torch.utils.checkpoint with use_reentrant=False"
            )
        bucket.missing.discard(parameter)
        for waiting in self._order:
            if waiting.missing:
                return
            if not waiting.started:
                self._start(waiting)

    @torch.no_grad()
    def _start(self, bucket: _Bucket, *, use: bool = True) -> None:
        """Begin the reduction of a bucket; ``use`` False: of whatever its buffer holds."""
        buffer = bucket.buffers[0]
        bucket.buffers.rotate(-1)
        while any(busy is buffer for _, busy, _ in self._running):
            self._complete_first(use=use)
        if use:
            copy_all([(view, gradient) for gradient, view in bucket.views(buffer)])
        flat = buffer[: bucket.numel]
        if self.divisor != 1:
            flat.div_(self.divisor)
        bucket.started = True
        self._running.append((bucket, buffer, dist.all_reduce(flat, async_op=True)))

    @torch.no_grad()
    def _complete_first(self, *, use: bool) -> None:
        bucket, buffer, handle = self._running.popleft()
        with exchange():
            handle.wait()
        if use:
            copy_all(list(bucket.views(buffer)))

    def _complete_all(self, *, use: bool) -> None:
        """Take part in all reductions that are left; ``use`` their results or drop them."""
        for bucket in self._order:
            if not bucket.started:
                self._start(bucket, use=use)
        while self._running:
            self._complete_first(use=use)


def by_kind(
    parameters: Sequence[nn.Parameter], compress: torch.dtype | None
) -> dict[tuple[torch.device, torch.dtype], list[nn.Parameter]]:
    """Group parameters that can share a buffer, by its device and dtype."""
    kinds: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, compress or parameter.dtype), []).append(parameter)
    return kinds


def in_buckets(parameters: Sequence[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Group parameters up to 16 MiB, the last ones first: backward reaches them first."""
    buckets: list[list[nn.Parameter]] = []
    taken = BUCKET_BYTES
    for parameter in reversed(parameters):
        size = parameter.numel() * parameter.element_size()
        if taken + size > BUCKET_BYTES:
            buckets.append([])
            taken = 0
        buckets[-1].append(parameter)
        taken += size
    return buckets


def laid_out(part: Tensor, like: Tensor) -> Tensor:
    """Return a flat tensor in the shape of ``like`` and, if that is dense, in its memory layout."""
    last = torch.channels_last
    if like.is_contiguous() or (like.dim() == 4 and like.is_contiguous(memory_format=last)):
        # Copying is fastest so.
        return part.as_strided(like.shape, like.stride(), part.storage_offset())
    return part.view(like.shape)


def averaging_bytes(parameters: Sequence[nn.Parameter]) -> int:
    """Return the bytes that averaging over several ranks holds on the device."""
    return BUFFERS * sum(
        max(sum(p.numel() for p in bucket) for bucket in in_buckets(members)) * dtype.itemsize
        for (_, dtype), members in by_kind(parameters, None).items()
    )
