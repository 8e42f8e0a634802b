"""One optimizer step: the same object trains, is timed and is measured, in every engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler

from d2scale.step import ranks
from d2scale.step.agreement import AgreedOutOfMemoryError, run_alone, run_together
from d2scale.step.averaging import GradientAverager
from d2scale.step.forward_backward import ForwardBackward, Part
from d2scale.step.guard import AllocatorRetries, MicroBatchSize
from d2scale.step.micro_batches import ExactModel, MicroBatch, PhaseMarker, StepLosses, cut
from d2scale.step.norms import synchronised_norms
from d2scale.step.ordered_sum import OrderedSum
from d2scale.step.undo import StepUndo
from d2scale.step.update import (
    GradientClipper,
    MomentumByGain,
    trained_parameters,
    update_weights,
)
from d2scale.step.virtual_ranks import VirtualRanks

logger = logging.getLogger(__name__)

BeforeUpdate = Callable[[StepLosses], None]
OnNewSize = Callable[[int], None]


@dataclass(frozen=True)
class StepOptions:
    """How steps are taken."""

    precision: torch.dtype | None = None  # of autocast; None: off
    scaler: GradScaler | None = None  # of the losses, for float16
    clip: GradientClipper | None = None  # limits the gradients, in place
    # "split" takes a step that runs out of memory again in smaller micro-batches, and later tries
    # the larger ones again; "stay_split" does not try; "raise" lets the error pass.
    on_oom: str = "split"
    compress: torch.dtype | None = None  # in which gradients cross the network; None: their own
    virtual_ranks: VirtualRanks | None = None  # that this rank runs in turn; None: only itself
    # Takes the forwards of a virtual rank whose images need several; None: the model.
    split_model: ExactModel | None = None


class OptimizerStep:
    """Takes optimizer steps: micro-batches forward and backward, averaging, update of the weights.

    A step that runs out of memory on any rank is undone on all of them and taken again: once as it
    was, with memory in one piece again, then with half the images per GPU. After a while more are
    tried again (:class:`MicroBatchSize`). Total batch, learning rate and result stay the same; only
    random draws inside the model (dropout) differ with other micro-batches.

    With virtual ranks a rank's images are those of its own virtual ranks, in their order, the same
    number for each; every one is a micro-batch of its own, or several if it does not fit.

    The model is bare, in training mode; ``on_new_size`` is called with the new images per GPU, on
    every rank, after the first step with them.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        ims_per_gpu: int,
        options: StepOptions | None = None,
        on_new_size: OnNewSize | None = None,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.options = options = options or StepOptions()
        device, grows = next(model.parameters()).device, options.on_oom == "split"
        self.size = MicroBatchSize(ims_per_gpu, device, grows=grows)
        self.on_new_size = on_new_size
        self._virtual_ranks = options.virtual_ranks
        self._averager = _averager(trained_parameters(optimizer), options)
        self._forward_backward = ForwardBackward(
            model,
            self._averager,
            precision=options.precision,
            scaler=options.scaler,
            virtual_ranks=options.virtual_ranks,
            split_model=options.split_model,
        )
        self._momentum = MomentumByGain(optimizer)
        self._undo = StepUndo(model, optimizer, options.scaler)
        self._retries = AllocatorRetries(device)
        # Ranks that wait for each other inside a forward cannot be told of an error there.
        self._can_agree = ranks.world_size() == 1 or not synchronised_norms(model)
        if options.on_oom != "raise" and not self._can_agree:
            logger.warning(
                "D2SCALE.ON_OOM is %s, but synchronised batch norm makes ranks wait for each "
                "other inside a forward: an out-of-memory error ends this run",
                options.on_oom,
            )

    @property
    def ims_per_gpu(self) -> int:
        """The most images in one forward."""
        return self.size.now

    @ims_per_gpu.setter
    def ims_per_gpu(self, images: int) -> None:
        self.size.now = images

    @property
    def phase(self) -> PhaseMarker:
        """Context managers around "forward", "backward" and "optimizer", for what watches them."""
        return self._forward_backward.phase

    @phase.setter
    def phase(self, marker: PhaseMarker) -> None:
        self._forward_backward.phase = marker

    def is_one_part(self, rank_batch: MicroBatch) -> bool:
        """Return whether a step is one forward on one rank: it is cut in two to measure noise."""
        return ranks.world_size() == 1 and len(self._cut(rank_batch, self.ims_per_gpu)) == 1

    def __call__(
        self,
        rank_batch: MicroBatch,
        before_update: BeforeUpdate | None = None,
        *,
        measure: bool = False,
        number: int = 0,
    ) -> StepLosses:
        """Take one step with this rank's images; ``measure`` the noise of its gradient.

        ``before_update`` is called with the losses when the gradients of the whole step are there,
        at every attempt. It makes no collective calls, and may set learning rates. All ranks
        ``measure``, or none. Virtual ranks draw the random numbers of the step's ``number``.

        Raises:
            StepDoesNotFitError: on every rank, if one image at a time is too much; model and
                optimizer are as before the step.
        """
        attempt = partial(self._attempt, rank_batch, before_update, measure, number)
        if self.options.on_oom == "raise" or not self._can_agree:
            return attempt(agrees=False)
        self._undo.forget()
        before = self.ims_per_gpu
        self.size.begin_step()
        while True:
            try:
                losses = attempt(agrees=True, undoable=True)
            except AgreedOutOfMemoryError as error:
                failure = error.with_traceback(None)
            else:
                break
            # Out of the handler: nothing holds the activations of the attempt any more.
            self._undo.restore()
            largest = max(len(part) for _, part in self._cut(rank_batch, self.ims_per_gpu))
            self.size.after_failure(failure, largest)
        self._retries.check()
        self.size.end_step()
        if self.on_new_size is not None and self.ims_per_gpu != before:
            self.on_new_size(self.ims_per_gpu)
        return losses

    def attempt(
        self, rank_batch: MicroBatch, before_update: BeforeUpdate | None = None
    ) -> StepLosses:
        """Take one step once; nothing is undone. On one rank it reads no values of tensors.

        Raises an AgreedOutOfMemoryError on every rank, if any of them ran out of memory.
        """
        return self._attempt(rank_batch, before_update, agrees=self._can_agree)

    def state_of_first_rank(self) -> AbstractContextManager[None]:
        """Return a context manager in which every rank's model has rank 0's state.

        That is the state of a checkpoint. All ranks enter it.
        """
        return self._undo.model_state.of_first_rank()

    def set_gain(self, gain: float) -> None:
        """Let the update of the running step count for ``gain`` of the recipe's steps.

        To be called before it, at every attempt. The learning rate is the caller's to set.
        """
        self._momentum.set(gain)

    def held_tensors(self) -> list[Tensor]:
        """Return what lives between steps: weights, buffers, optimizer state, averaging buffers."""
        virtual = self._virtual_ranks.held_tensors() if self._virtual_ranks else []
        states = (value for state in self.optimizer.state.values() for value in state.values())
        tensors = (value for value in states if isinstance(value, Tensor))
        own = [*self.model.parameters(), *self.model.buffers()]
        return [*own, *virtual, *tensors, *self._averager.buffers]

    def _attempt(
        self,
        rank_batch: MicroBatch,
        before_update: BeforeUpdate | None,
        measure: bool = False,
        number: int = 0,
        *,
        agrees: bool,
        undoable: bool = False,
    ) -> StepLosses:
        self.optimizer.zero_grad(set_to_none=True)
        ims_per_gpu = self.ims_per_gpu
        # Cut in two, a larger size would not be tried.
        if measure and self.is_one_part(rank_batch) and not self.size.trying:
            ims_per_gpu = -(-len(rank_batch) // 2)
        parts = self._cut(rank_batch, ims_per_gpu)
        if self._virtual_ranks is not None:
            self._virtual_ranks.begin(number)
        # Copies are made beside the forward, and agreed on together with the loss normalizers.
        prepare = self._undo.remember if undoable else None
        losses = self._forward_backward(parts, agrees=agrees, prepare=prepare, measure=measure)
        self._undo.settle()
        if self._virtual_ranks is not None:
            self._virtual_ranks.leave_first()
        run = run_together if agrees else run_alone
        run("the optimizer", partial(self._update, losses, before_update))
        if self._virtual_ranks is not None:
            self._virtual_ranks.end()
        return losses

    def _cut(self, rank_batch: MicroBatch, ims_per_gpu: int) -> list[Part]:
        if self._virtual_ranks is not None:
            return [*self._virtual_ranks.cut(rank_batch, ims_per_gpu)]
        return [(None, micro_batch) for micro_batch in cut(rank_batch, ims_per_gpu)]

    def _update(self, losses: StepLosses, before_update: BeforeUpdate | None) -> None:
        if before_update is not None:
            before_update(losses)
        with self.phase("optimizer"):
            update_weights(self.optimizer, self.options.scaler, self.options.clip)


def _averager(
    parameters: Sequence[nn.Parameter], options: StepOptions
) -> GradientAverager | OrderedSum:
    virtual = options.virtual_ranks
    if virtual is not None and virtual.ordered:
        return OrderedSum(parameters, virtual.count, options.compress)
    return GradientAverager(parameters, options.compress)


@contextmanager
def learning_rates_zero(optimizer: torch.optim.Optimizer) -> Iterator[None]:
    """Let steps move nothing, so that they cannot diverge."""
    before = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    try:
        yield
    finally:
        for group, learning_rate in zip(optimizer.param_groups, before, strict=True):
            group["lr"] = learning_rate
