"""Surviving an out-of-memory error: how micro-batches shrink and grow, when failure is near."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch

from d2scale.errors import D2ScaleError
from d2scale.step import ranks
from d2scale.step.agreement import AgreedOutOfMemoryError

logger = logging.getLogger(__name__)

# Steps between two looks at the allocator's statistics, which take the host's time, and between
# two lines about its retries.
_LOOKS_APART = 20
_RETRY_LINES_APART = 100
# Memory in pieces makes a step fail that fits otherwise: of 490 modelled steps near the limit two
# did. Where it happens more often than this the size is too large: each time costs a step.
_REPEATS_APART = 100
# Steps without a failure before a larger size is tried: what took the memory may have ended, and a
# try in vain, which costs a step, adds 0.2 per cent.
_GROW_AFTER = 500
_KEPT = ("planned", "larger", "steps", "repeat_from", "grow_from", "wait", "tries")
_ALLOCATOR_SETTINGS = "PYTORCH_CUDA_ALLOC_CONF"


class StepDoesNotFitError(D2ScaleError):
    """A step needs more memory than there is even with one image at a time."""


class MicroBatchSize:
    """The images per GPU that fit: fewer after an out-of-memory error, more again after a while.

    Everything here follows from steps and errors of which all ranks know, so they always agree.

    Args:
        planned: images per GPU at the beginning.
        device: of the model.
        grows: whether a larger size is tried again.
    """

    def __init__(self, planned: int, device: torch.device, *, grows: bool = True) -> None:
        self.now = planned  # images per GPU of the next attempt
        self._planned = planned
        self._device = device
        self._grows = grows
        self._larger: list[int] = []  # sizes that ran out of memory, each below the one before
        self._steps = 0  # that are done
        self._repeat_from = 0  # the step from which a size may fail once without being cut
        self._grow_from = 0  # the step that tries the last of the larger sizes
        self._wait = _GROW_AFTER  # steps without a failure before that
        self._tries = 0  # of larger sizes
        # What the running step does: it tries a larger size, or one that failed a moment ago.
        self.trying = self._repeating = False

    def begin_step(self) -> None:
        """Try a larger size in the coming step, where one is due."""
        self.trying = bool(self._grows and self._larger and self._steps >= self._grow_from)
        if self.trying:
            self.now = self._larger.pop()
            self._tries += 1

    def end_step(self) -> None:
        """Count a step that has succeeded."""
        self._steps += 1
        if self.trying:
            logger.info("%d images per GPU at a time fit again, and stay", self.now)
            self._grow_from = self._steps + self._wait
        if self._repeating:
            logger.warning(
                "%d images per GPU did fit once unused memory was given back: it was fragmented%s",
                *(self.now, self._advice()),
            )
        self.trying = self._repeating = False

    def after_failure(self, failure: AgreedOutOfMemoryError, own_largest: int) -> None:
        """Choose the size with which the step is taken again, and log it.

        Every rank calls it, with the images of its own largest micro-batch.

        Raises:
            StepDoesNotFitError: if it was one image.
        """
        largest = int(ranks.largest_over_ranks({"images": own_largest})["images"])
        if not self.trying and self._steps >= self._repeat_from:
            self._repeat_from = self._steps + _REPEATS_APART
            self._repeating = True
            text = "Out of memory in %s: the step is undone and taken again, after freeing memory"
            logger.warning(text, _where(failure))
            return
        if largest == 1:
            raise StepDoesNotFitError(
                f"out of memory in {_where(failure)}, with one image per GPU at a time; lower "
                "INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, set SOLVER.AMP.ENABLED to True, "
                "checkpoint activations (D2SCALE.ACTIVATION_CHECKPOINTING in the default engine, "
                "MODEL.MODELING_HOOKS in d2go), end other programs on the GPU, or use one with "
                "more memory; then go on with --resume"
            )
        self.now = -(-largest // 2)
        self._larger.append(largest)
        # A size that has been tried and fails again is tried later and later.
        self._wait *= 2 if self._tries else 1
        self._grow_from = self._steps + 1 + self._wait
        self.trying = self._repeating = False
        logger.warning(
            "Out of memory in %s: the step is undone and taken again with %d images per GPU at a "
            "time instead of %d, %s; total batch, learning rate and schedule do not change%s",
            *(_where(failure), self.now, largest, self._how_long(), self._advice()),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, between two steps."""
        return {name: getattr(self, f"_{name}") for name in _KEPT} | {"now": self.now}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as a checkpoint says, if its run was planned with as many images per GPU.

        ValueError, TypeError or LookupError for a state that is none.
        """
        counts = [state[name] for name in _KEPT if name != "larger"]
        sizes = [*state["larger"], state["now"]]
        if not all(type(count) is int and count >= 0 for count in (*counts, *sizes)):
            raise ValueError("a count of micro-batches is no whole number")
        if state["planned"] != self._planned:
            return
        if not 1 <= sizes[-1] <= self._planned or sizes != sorted({*sizes}, reverse=True):
            raise ValueError(f"images per GPU {sizes} do not fit into {self._planned}")
        for name in _KEPT:
            setattr(self, f"_{name}", state[name])
        self._larger, self.now = list(self._larger), state["now"]
        if self._larger:
            text = "%d images per GPU at a time, as before: %d ran out of memory"
            logger.info(text, self.now, self._larger[-1])

    def _how_long(self) -> str:
        return f"until {self._wait} steps have gone well" if self._grows else "which stays so"

    def _advice(self) -> str:
        known = os.environ.get(_ALLOCATOR_SETTINGS, "")
        if self._device.type != "cuda" or "expandable_segments" in known:
            return ""
        setting = f"{_ALLOCATOR_SETTINGS}=expandable_segments:True"
        return f". {setting} in the environment keeps memory in one piece"


def _where(failure: AgreedOutOfMemoryError) -> str:
    reason = f" ({failure.reason})" if failure.reason else ""
    return f"{failure.part} on rank {', '.join(map(str, failure.ranks))}{reason}"


class AllocatorRetries:
    """Warns when CUDA's allocator had to empty its cache to find room: failure is near."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._known = self._count()
        self._steps = 0
        self._quiet_until = 0  # a number of steps

    def check(self) -> None:
        """Look now and then whether there were more; to be called once a step."""
        self._steps += 1
        if self._steps % _LOOKS_APART or self._steps < self._quiet_until:
            return
        count = self._count()
        if count > self._known:
            logger.warning(
                "The CUDA allocator has emptied its cache %d times to find memory: steps get "
                "slow, and an out-of-memory error is near",
                count - self._known,
            )
            self._known = count
            self._quiet_until = self._steps + _RETRY_LINES_APART

    def _count(self) -> int:
        on_cuda = self._device.type == "cuda"
        return torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0) if on_cuda else 0
