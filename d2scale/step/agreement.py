"""Parts of a step that every rank completes, or none: no rank waits for one that failed.

A rank that runs out of memory between two collective calls would leave the others in the second
one for ever. So each part of a step that needs memory runs here, and the ranks exchange one flag
each before any of them goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from d2scale.step import ranks
from d2scale.step.out_of_memory import is_out_of_memory

T = TypeVar("T")


class AgreedOutOfMemoryError(Exception):
    """Some rank ran out of memory; raised on every rank.

    Attributes:
        part: what the ranks were doing.
        ranks: those that failed.
        reason: the first line of this rank's error; empty if it did not fail.
    """

    def __init__(self, part: str, ranks: Sequence[int], reason: str) -> None:
        super().__init__(f"{part}: out of memory on rank {', '.join(map(str, ranks))}")
        self.part = part
        self.ranks = tuple(ranks)
        self.reason = reason


def run_together(part: str, work: Callable[[], T], counts: Tensor | None = None) -> T:
    """Run ``work`` on every rank and return its result, if it succeeded on all of them.

    Args:
        part: name of the work, for the error.
        work: makes no collective calls that a failing rank would miss.
        counts: int64 on the CPU, read after ``work``; summed over the ranks in place, in the
            same exchange.

    Raises:
        AgreedOutOfMemoryError: on every rank, if any of them ran out of memory.
        Exception: any other error of ``work``, unchanged, on this rank alone.
    """
    results: list[T] = []
    reason = ""
    try:
        results.append(work())
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    # Outside of the handler: the error is gone, and the activations that its frames held.
    failed = _exchange(not results, counts)
    if failed:
        results.clear()
        raise AgreedOutOfMemoryError(part, failed, reason)
    return results[0]


def run_alone(part: str, work: Callable[[], T], counts: Tensor | None = None) -> T:
    """Run ``work`` and sum ``counts`` as :func:`run_together` does; errors pass unchanged."""
    result = work()
    if counts is not None:
        ranks.sum_on_host(counts)
    return result


def _exchange(failed: bool, counts: Tensor | None) -> list[int]:
    """Return the ranks that failed, and sum ``counts`` over all ranks."""
    world_size = ranks.world_size()
    if world_size == 1:
        return [0] if failed else []
    message = torch.zeros(world_size + (0 if counts is None else len(counts)), dtype=torch.int64)
    message[ranks.rank()] = failed
    if counts is not None:
        message[world_size:] = counts
    ranks.sum_on_host(message)
    if counts is not None:
        counts.copy_(message[world_size:])
    return [number for number, flag in enumerate(message[:world_size].tolist()) if flag]
