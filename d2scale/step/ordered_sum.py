"""Adding up the gradients of virtual ranks in their order, whichever ranks run them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn

from d2scale.planning.rules import own_virtual_ranks
from d2scale.step import ranks
from d2scale.step.averaging import by_kind, in_buckets
from d2scale.step.waiting import exchange

Gradients = list[Tensor | None]


class OrderedSum:
    """Replaces gradients by ((g0 + g1) + g2) + ..., the same bits on any number of ranks.

    An all-reduce adds in an order of its own. Here every rank keeps the gradients of each of its
    virtual ranks, and sends them to all others when the step has succeeded everywhere. Gradients
    cross the network in the dtype ``compress``, or else in their own.
    """

    counts = torch.zeros(0, dtype=torch.int64)  # there are none to sum
    divisor = 1

    def __init__(
        self, parameters: Sequence[nn.Parameter], count: int, compress: torch.dtype | None = None
    ) -> None:
        self.parameters = tuple(parameters)
        # Of rank 0 the sum over its virtual ranks, which are the first.
        self._kept: list[Gradients] = []
        shares = range(ranks.world_size())
        own = [len(own_virtual_ranks(count, rank, len(shares))) for rank in shares]
        self._senders = [0, *(rank for rank in shares[1:] for _ in range(own[rank]))]
        self._buckets = [
            (dtype, bucket)
            for (_, dtype), members in by_kind(self.parameters, compress).items()
            for bucket in in_buckets(members)
        ]
        self.buffers: list[Tensor] = []  # each is made when it is needed

    @contextmanager
    def taking_part(self, *, joins: bool) -> Iterator[None]:
        """Begin a step. No rank waits for another inside the context."""
        self._kept = []
        yield

    def last_backward(self) -> AbstractContextManager[None]:
        """Return a context manager that does nothing."""
        return nullcontext()

    def end_virtual_rank(self) -> None:
        """Keep the gradients of the virtual rank that has run apart from the next one's."""
        gradients: Gradients = [parameter.grad for parameter in self.parameters]
        for parameter in self.parameters:
            parameter.grad = None
        if ranks.rank() == 0 and self._kept:
            for index, gradient in enumerate(gradients):
                self._kept[0][index] = _added(self._kept[0][index], gradient)
        else:
            self._kept.append(gradients)

    @torch.no_grad()
    def finish(self) -> None:
        """Add up what all ranks have kept. The step has succeeded on all of them."""
        if ranks.world_size() == 1:
            for parameter, gradient in zip(self.parameters, self._kept[0], strict=True):
                parameter.grad = gradient
        else:
            used = ranks.sum_on_host(torch.tensor([_some(every) for every in self._by_parameter()]))
            places = {parameter: index for index, parameter in enumerate(self.parameters)}
            for dtype, parameters in self._buckets:
                self._sum([places[p] for p in parameters if used[places[p]]], dtype)
        self._kept = []

    def _by_parameter(self) -> Iterator[tuple[Tensor | None, ...]]:
        return zip(*self._kept, strict=True)

    def _sum(self, places: Sequence[int], dtype: torch.dtype) -> None:
        """Set the gradients of the parameters at ``places``."""
        if not places:
            return
        parameters = [self.parameters[place] for place in places]
        sizes = [parameter.numel() for parameter in parameters]
        buffer = parameters[0].new_empty(sum(sizes), dtype=dtype)
        total: Tensor | None = None
        own = iter(self._kept)
        for sender in self._senders:
            if sender == ranks.rank():
                gradients = next(own)
                for part, place in zip(buffer.split(sizes), places, strict=True):
                    gradient = gradients[place]
                    part.zero_() if gradient is None else part.copy_(gradient.reshape(-1))
            with exchange():
                dist.broadcast(buffer, sender)
            total = buffer.clone() if total is None else total.add_(buffer)
        assert total is not None
        for part, parameter in zip(total.split(sizes), parameters, strict=True):
            parameter.grad = torch.empty_like(parameter).copy_(part.view(parameter.shape))


def _some(gradients: Sequence[Tensor | None]) -> int:
    return int(any(gradient is not None for gradient in gradients))


def _added(total: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    if total is None or gradient is None:
        return gradient if total is None else total
    return total.add_(gradient)
