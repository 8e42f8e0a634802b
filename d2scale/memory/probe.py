"""Measuring on the device: the most images whose whole training steps fit, on every rank."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch

from d2scale.errors import ConfigError, Fault
from d2scale.memory.agreement import largest_of_ranks, raise_failure, ranks
from d2scale.memory.devices import Device
from d2scale.memory.preserve import free_gradients, learning_rates_zero, training_state_kept
from d2scale.memory.search import SizeSearch
from d2scale.memory.steps import TrainingStep
from d2scale.planning.memory_profile import GIB, MEASURED, MemoryProfile, Phase, Point
from d2scale.step.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

_FITS, _OUT_OF_MEMORY, _FAILED = 0, 1, 2


@dataclass(frozen=True)
class Trial:
    """The outcome of one size, the same on all ranks.

    Attributes:
        ims_per_gpu: the size.
        fits: whether all ranks took their steps.
        live_bytes, reserved_bytes: the most of any rank.
    """

    ims_per_gpu: int
    fits: bool
    live_bytes: int
    reserved_bytes: int


@dataclass(frozen=True)
class Measurement:
    """What the trials have shown.

    Attributes:
        largest: the most images per GPU that fit; 0: not even one does.
        trials: in order.
        tensor_bytes: what was allowed to the tensors of each rank.
        context_bytes: what is taken of the devices besides tensors; the most of any rank.
        error: what one image ran into, if nothing fits.
    """

    largest: int
    trials: tuple[Trial, ...]
    tensor_bytes: int
    context_bytes: int
    error: str = ""


@dataclass(frozen=True)
class Probe:
    """Tries sizes on a device.

    Every rank must do the same at the same time. The steps themselves make no collective calls
    (what DistributedDataParallel holds is allocated in its place), and the ranks agree after
    each trial, so a rank that runs out of memory, or fails, never leaves another waiting.

    Attributes:
        device: this rank's.
        step: on the device; it is left as it was.
        batches: gives the batches of one trial, for a number of images.
    """

    device: Device
    step: TrainingStep
    batches: Callable[[int], Sequence[Any]]

    def measure(
        self, predicted: MemoryProfile, budget_bytes: int, *, limit: int = 0
    ) -> Measurement:
        """Search for the most images that fit.

        A step with one image comes first, so that kernels and communicators, which take memory
        at their first use, have taken it before the room for tensors is known.

        Args:
            predicted: where the search begins; the same on all ranks.
            budget_bytes: of the device's memory, what else takes of it included.
            limit: no more images than this are wanted; 0: no limit.

        Raises:
            AnotherRankFailed: if a trial of another rank fails for another reason than memory.
            Exception: what this rank's own trial fails with, untouched.
        """
        self._try(1, self.batches(1)[:1], budget_bytes)
        context_bytes = largest_of_ranks([self.device.context_bytes])[0]
        tensor_bytes = max(0, budget_bytes - context_bytes)
        tensors_alone = replace(predicted, context_bytes=0)
        guess = tensors_alone.largest_ims_per_gpu(tensor_bytes, world_size=ranks())
        search = SizeSearch(max(1, guess), limit)
        trials: list[Trial] = []
        error = ""
        while (size := search.next_size()) is not None:
            trial, error = self._try(size, self.batches(size), tensor_bytes)
            trials.append(trial)
            search.record(size, trial.fits, _expected_most(tensors_alone, trial, tensor_bytes))
            logger.info(
                "%d images per GPU %s (%.2f GiB live, %.2f GiB reserved)",
                *(size, "fit" if trial.fits else "do not fit"),
                *(trial.live_bytes / GIB, trial.reserved_bytes / GIB),
            )
        return Measurement(search.largest, tuple(trials), tensor_bytes, context_bytes, error)

    def _try(self, size: int, batches: Sequence[Any], tensor_bytes: int) -> tuple[Trial, str]:
        """Take steps with batches that lie in the machine's memory, as a loader's do."""
        outcome, text = _FITS, ""
        error: BaseException | None = None
        with ExitStack() as stack:
            stack.enter_context(training_state_kept(self.step))
            stack.enter_context(learning_rates_zero(self.step.optimizer))
            stack.enter_context(self.device.limited(tensor_bytes, self.step.held()))
            try:
                self._take_steps(batches)
            except Exception as caught:
                error = caught
                outcome = _OUT_OF_MEMORY if is_out_of_memory(caught) else _FAILED
                text = f"{type(caught).__name__}: {caught}"
            live, reserved = self.device.peaks()
            if error is not None and outcome == _OUT_OF_MEMORY:
                # The traceback's frames hold the failed step's tensors.
                error.with_traceback(None)
            free_gradients(self.step.model)
        worst, live, reserved = largest_of_ranks([outcome, live, reserved])
        if worst == _FAILED:
            raise_failure(error if outcome == _FAILED else None)
        return Trial(size, worst == _FITS, live, reserved), text

    def _take_steps(self, batches: Sequence[Any]) -> None:
        buckets = self._buckets()
        for batch in batches:
            self.step(batch)
        del buckets

    def _buckets(self) -> list[torch.Tensor]:
        """What DistributedDataParallel adds: flat copies of the gradients."""
        if ranks() == 1:
            return []
        return [torch.empty_like(parameter) for parameter in self.step.parameters()]


def measured_profile(
    predicted: MemoryProfile, measurement: Measurement, budget_bytes: int, description: str
) -> MemoryProfile:
    """Bend the prediction so that it says what was measured, at the budget it was measured for.

    Raises:
        ConfigError: if nothing fits.
    """
    if measurement.largest == 0:
        raise ConfigError([_nothing_fits(measurement, budget_bytes)])
    world_size = ranks()
    base = replace(predicted, context_bytes=measurement.context_bytes)
    border = any(t.ims_per_gpu == measurement.largest + 1 for t in measurement.trials)
    # Halfway between what fits and what does not, or right at what fits.
    at = measurement.largest + (0.5 if border else 0.0)
    fixed = base.peak_bytes(0, world_size=world_size) - max(p.static_bytes for p in base.phases)
    room = budget_bytes - fixed
    factor = room / (base.peak_bytes(at, world_size=world_size) - fixed)
    phases = tuple(
        Phase(p.name, int(p.static_bytes * factor), int(p.bytes_per_image * factor))
        for p in base.phases
    )
    # Where the optimizer's step is the peak, the lines alone would allow more than was seen.
    phases += (Phase("measured", 0, int(room / at)),)
    points = tuple(
        Point(t.ims_per_gpu, t.live_bytes, t.reserved_bytes) for t in measurement.trials if t.fits
    )
    return replace(base, phases=phases, source=MEASURED, description=description, points=points)


def _expected_most(predicted: MemoryProfile, trial: Trial, tensor_bytes: int) -> int:
    """Images that should fit if the prediction is as far off for all as it was for the trial."""
    predicted_bytes = predicted.peak_bytes(trial.ims_per_gpu, world_size=ranks())
    error_bytes = trial.reserved_bytes - predicted_bytes
    return predicted.largest_ims_per_gpu(tensor_bytes - error_bytes, world_size=ranks())


def _nothing_fits(measurement: Measurement, budget_bytes: int) -> Fault:
    return Fault(
        "D2SCALE.MEMORY.BUDGET_GIB",
        round(budget_bytes / GIB, 2),
        "what one image takes",
        f"one image does not fit in the {measurement.tensor_bytes / GIB:.2f} GiB that are left "
        "for tensors: try SOLVER.AMP.ENABLED, D2SCALE.ACTIVATION_CHECKPOINTING or a smaller "
        "INPUT.MIN_SIZE_TRAIN (it said: "
        f"{measurement.error.splitlines()[0][:200]})",
    )
