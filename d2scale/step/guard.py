"""Surviving an out-of-memory error: how the micro-batches shrink, and when failure is near."""

from __future__ import annotations

import logging

import torch

from d2scale.errors import D2ScaleError
from d2scale.step import ranks
from d2scale.step.agreement import AgreedOutOfMemoryError

logger = logging.getLogger(__name__)

# Steps between two lines about allocator retries.
_RETRY_LINES_APART = 100


class StepDoesNotFitError(D2ScaleError):
    """A step needs more memory than there is even with one image at a time."""


def smaller_micro_batches(failure: AgreedOutOfMemoryError, own_largest: int) -> int:
    """Return half of the images per GPU with which a step ran out of memory, and log it.

    Every rank calls it, with the images of its own largest micro-batch.

    Raises:
        StepDoesNotFitError: if it was one image.
    """
    largest = int(ranks.largest_over_ranks({"images": own_largest})["images"])
    if largest == 1:
        raise StepDoesNotFitError(
            f"out of memory in {_where(failure)}, with one image per GPU at a time; lower "
            "INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, set SOLVER.AMP.ENABLED or "
            "D2SCALE.ACTIVATION_CHECKPOINTING to True, end other programs on the GPU, or use "
            "one with more memory; then go on with --resume"
        )
    smaller = -(-largest // 2)
    logger.warning(
        "Out of memory in %s: the step is undone and taken again with %d images per GPU at a "
        "time instead of %d, which stays so; total batch, learning rate and schedule do not change",
        *(_where(failure), smaller, largest),
    )
    return smaller


def _where(failure: AgreedOutOfMemoryError) -> str:
    reason = f" ({failure.reason})" if failure.reason else ""
    return f"{failure.part} on rank {', '.join(map(str, failure.ranks))}{reason}"


class AllocatorRetries:
    """Warns when CUDA's allocator had to empty its cache to find room: failure is near."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = self._count()
        self._quiet_steps = 0

    def check(self) -> None:
        """Compare with the last call, to be made once a step."""
        self._quiet_steps = max(0, self._quiet_steps - 1)
        count = self._count()
        if count > self._known and not self._quiet_steps:
            logger.warning(
                "The CUDA allocator has emptied its cache %d times to find memory: steps get "
                "slow, and an out-of-memory error is near",
                count - self._known,
            )
            self._known = count
            self._quiet_steps = _RETRY_LINES_APART

    def _count(self) -> int:
        on_cuda = self._device.type == "cuda"
        return torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0) if on_cuda else 0
