"""Copies of tensors in the host's memory, to bring them back after a step that failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from d2scale.step.averaging import laid_out
from d2scale.step.private_torch import copy_all

# A view as another dtype begins at a multiple of its size, and copies are fastest at this.
_ALIGNMENT = 512


class HostCopies:
    """The values of some tensors, as they were when :meth:`take` was called last.

    Those of a GPU are copied asynchronously, on the current stream. All that is new in one call
    shares one block of pinned memory: torch rounds each block up to a power of two.
    """

    def __init__(self) -> None:
        self._copies: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Iterable[Tensor]) -> None:
        """Copy ``tensors``. What was copied before and is not among them is forgotten."""
        tensors = list(tensors)
        known = {t: self._copies[t] for t in tensors if t in self._copies}
        new = [tensor for tensor in tensors if tensor not in known]
        self._copies = known | dict(zip(new, _room_for(new), strict=True))
        copy_all([(copy, tensor) for tensor, copy in self._copies.items()], asynchronous=True)

    @torch.no_grad()
    def bring_back(self) -> None:
        """Give the tensors their values again."""
        copy_all(list(self._copies.items()))


def _room_for(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return a tensor on the host for each, of its shape and layout, without values."""
    sizes = [-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors]
    pinned = any(tensor.is_cuda for tensor in tensors)
    block = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=pinned)
    return [
        laid_out(part[: tensor.nbytes].view(tensor.dtype), tensor)
        for part, tensor in zip(block.split(sizes) if sizes else (), tensors, strict=True)
    ]
