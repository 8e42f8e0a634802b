"""Surviving an out-of-memory error: undo the step and take it again in smaller micro-batches."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from d2scale.errors import D2ScaleError
from d2scale.planning.rules import micro_batch_sizes
from d2scale.step.agreement import AgreedOutOfMemoryError, Agreement
from d2scale.step.micro_batches import MicroBatch, MicroBatchStep, StepLosses, cut
from d2scale.step.undo import StepUndo

logger = logging.getLogger(__name__)

Finish = Callable[[StepLosses], None]
OnSplit = Callable[[int], None]

# Steps between two lines about allocator retries.
_RETRY_LINES_APART = 100


class StepDoesNotFitError(D2ScaleError):
    """A step needs more memory than there is even with one image at a time."""


class OomGuard:
    """Takes whole optimizer steps; one that runs out of memory is taken again in more parts.

    All ranks learn of a failure on any of them, undo the step and halve the images per GPU,
    which stay halved. Total batch, learning rate and what the step computes stay; only draws of
    chance inside the model (dropout) fall differently on other micro-batches.

    Args:
        model: in training mode, bare or wrapped in ``DistributedDataParallel``, whose own
            averaging is never used: it would leave ranks waiting for one that failed.
        optimizer: over parameters of ``model``.
        ims_per_batch: images in one step, over all ranks.
        ims_per_gpu: images in one forward, to begin with.
        precision, scaler: see :class:`d2scale.step.micro_batches.MicroBatchStep`.
        on_split: is told the new images per GPU, on every rank, before the step is taken again.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ims_per_batch: int,
        ims_per_gpu: int,
        precision: torch.dtype | None = None,
        scaler: GradScaler | None = None,
        on_split: OnSplit | None = None,
    ) -> None:
        bare = model.module if isinstance(model, DistributedDataParallel) else model
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._agreement = Agreement([p for p in trained if p.requires_grad])
        self._step = MicroBatchStep(
            model, precision=precision, scaler=scaler, agreement=self._agreement
        )
        self._undo = StepUndo(bare, optimizer, scaler)
        self._optimizer = optimizer
        self._on_split = on_split
        self._world_size, self._rank = 1, 0
        if dist.is_available() and dist.is_initialized():
            self._world_size, self._rank = dist.get_world_size(), dist.get_rank()
        self.ims_per_batch = ims_per_batch
        self.ims_per_gpu = ims_per_gpu
        self._retries = AllocatorRetries(next(bare.parameters()).device)

    def __call__(self, share: MicroBatch, finish: Finish) -> StepLosses:
        """Take one step.

        Args:
            share: this rank's images of the step.
            finish: is given the losses when the gradients of the whole step are there, and
                updates the weights. It makes no collective calls.

        Raises:
            StepDoesNotFitError: on every rank, if one image at a time is too much; the model
                and the optimizer are as before the step.
            Exception: any other error, as it is.
        """
        self._undo.remember()
        while True:
            try:
                losses = self._attempt(share, finish)
            except AgreedOutOfMemoryError as error:
                failure = error.with_traceback(None)
            else:
                self._retries.check()
                return losses
            self._undo.restore()
            _free_memory()
            self._split(failure)

    def _attempt(self, share: MicroBatch, finish: Finish) -> StepLosses:
        sizes = self._sizes()
        self._optimizer.zero_grad(set_to_none=True)
        losses = self._step(cut(share, sizes[self._rank]))
        self._undo.settle()
        self._agreement.run("the optimizer", lambda: finish(losses))
        return losses

    def _sizes(self) -> tuple[tuple[int, ...], ...]:
        return micro_batch_sizes(self.ims_per_batch, self._world_size, self.ims_per_gpu)

    def _split(self, failure: AgreedOutOfMemoryError) -> None:
        # What ran: 6 images, 5 at a time, are 3 and 3.
        largest = max(max(sizes) for sizes in self._sizes())
        where = f"{failure.part} on rank {', '.join(map(str, failure.ranks))}"
        reason = f" ({failure.reason})" if failure.reason else ""
        if largest == 1:
            raise StepDoesNotFitError(
                f"out of memory in {where}{reason}, with one image per GPU at a time; lower "
                "INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, set SOLVER.AMP.ENABLED or "
                "D2SCALE.ACTIVATION_CHECKPOINTING to True, end other programs on the GPU, or use "
                "one with more memory; then go on with --resume"
            )
        self.ims_per_gpu = -(-largest // 2)
        logger.warning(
            "Out of memory in %s%s: the step is undone and taken again with %d images per GPU "
            "at a time instead of %d, which stays so; total batch, learning rate and schedule "
            "do not change",
            *(where, reason, self.ims_per_gpu, largest),
        )
        if self._on_split is not None:
            self._on_split(self.ims_per_gpu)


class AllocatorRetries:
    """Warns when CUDA's allocator had to empty its cache to find room: failure is near.

    Args:
        device: of this rank; other than CUDA: nothing is watched.
    """

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
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0))


def _free_memory() -> None:
    # Frames in reference cycles keep activations alive.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
