"""How the ranks of a run come to the same answer about memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

T = TypeVar("T")


class AnotherRankFailed(RuntimeError):  # noqa: N818 - names what happened
    """A trial of another rank failed for another reason than memory."""


def ranks() -> int:
    """Return the number of ranks, 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def largest_of_ranks(values: Sequence[int]) -> list[int]:
    """Return the largest of each value over all ranks."""
    if ranks() == 1:
        return list(values)
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(values, dtype=torch.int64, device=device)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return [int(value) for value in tensor.tolist()]


def of_first_rank(value: T) -> T:
    """Return what the first rank has."""
    return _of_all_ranks(value)[0]


def raise_failure(error: BaseException | None) -> None:
    """Raise this rank's error, or tell that of the first rank that has one. All ranks call it.

    Raises:
        AnotherRankFailed: on the ranks that have none.
        BaseException: ``error``, untouched.
    """
    texts = _of_all_ranks("" if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    rank, text = next((rank, text) for rank, text in enumerate(texts) if text)
    raise AnotherRankFailed(f"rank {rank} failed while memory was measured: {text}")


def _of_all_ranks(value: T) -> list[T]:
    if ranks() == 1:
        return [value]
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    return values
