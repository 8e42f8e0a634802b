"""Measuring the most images per GPU whose whole training steps fit, on the devices of all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from d2scale.memory.devices import Device
from d2scale.memory.predict import Workload, predict
from d2scale.memory.preserve import training_state_kept
from d2scale.memory.search import SizeSearch
from d2scale.planning.memory_profile import GIB, MEASURED, MemoryProfile, Phase, Point
from d2scale.step import ranks
from d2scale.step.agreement import AgreedOutOfMemoryError
from d2scale.step.micro_batches import MicroBatch
from d2scale.step.optimizer_step import OptimizerStep, learning_rates_zero
from d2scale.step.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """The outcome of one number of images, the same on all ranks.

    Attributes:
        ims_per_gpu: the images.
        fits: whether all ranks took their steps.
        live_bytes, reserved_bytes: the most of any rank.
        reason: the error of a rank that ran out of memory; empty if it fits.
    """

    ims_per_gpu: int
    fits: bool
    live_bytes: int
    reserved_bytes: int
    reason: str = ""


@dataclass(frozen=True)
class Measurement:
    """The result of a search, the same on all ranks."""

    largest: int  # the most images per GPU that fit; 0: not even one does
    trials: tuple[Trial, ...]  # in order
    budget_bytes: int  # memory of a device that training may take, the least of any rank
    tensor_bytes: int  # the part of it that tensors can have, the least of any rank

    @property
    def context_bytes(self) -> int:
        """The part of the budget that tensors cannot have."""
        return self.budget_bytes - self.tensor_bytes


@dataclass(frozen=True)
class Probe:
    """Tries numbers of images on a device. Every rank must do the same at the same time.

    A trial takes the very steps that train. If a rank runs out of memory in one, all ranks end
    it together.
    """

    device: Device  # this rank's
    step: OptimizerStep  # on the device; it is left as it was
    # Returns the batches of one trial, in the machine's memory as a loader's are, for a number of
    # images.
    batches: Callable[[int], Sequence[MicroBatch]]

    def measure(
        self, predicted: MemoryProfile, budget_bytes: int, *, limit: int = 0
    ) -> Measurement:
        """Search for the most images that fit on every rank.

        Args:
            predicted: where the search begins; the same on all ranks.
            budget_bytes: memory of this rank's device that training may take.
            limit: no more images than this are wanted; 0: no limit.

        Raises:
            AnotherRankFailedError: if a step of another rank fails for another reason than memory.
            Exception: what this rank's own step fails with, unchanged.
        """
        # Kernels and communicators take memory at their first use: before the room is known.
        self._try(self.batches(1)[:1], budget_bytes)
        budget_bytes, tensor_bytes = self._smallest_room(budget_bytes)
        tensors_alone = replace(predicted, context_bytes=0)
        guess = tensors_alone.largest_ims_per_gpu(tensor_bytes, world_size=ranks.world_size())
        search = SizeSearch(max(1, guess), limit)
        trials: list[Trial] = []
        while (images := search.next_size()) is not None:
            trial = self._try(self.batches(images), tensor_bytes)
            trials.append(trial)
            search.record(images, trial.fits, _expected_most(tensors_alone, trial, tensor_bytes))
            logger.info(
                "%d images per GPU %s (%.2f GiB live, %.2f GiB reserved)",
                *(images, "fit" if trial.fits else "do not fit"),
                *(trial.live_bytes / GIB, trial.reserved_bytes / GIB),
            )
        return Measurement(search.largest, tuple(trials), budget_bytes, tensor_bytes)

    def _smallest_room(self, budget_bytes: int) -> tuple[int, int]:
        """Return the budget and the bytes for tensors of the ranks that have the least."""
        room = self.device.room(budget_bytes)
        negative = ranks.largest_over_ranks({"budget": -budget_bytes, "room": -room})
        return -int(negative["budget"]), max(0, -int(negative["room"]))

    def _try(self, batches: Sequence[MicroBatch], tensor_bytes: int) -> Trial:
        step, fits, reason = self.step, True, ""
        with (
            training_state_kept(step),
            learning_rates_zero(step.optimizer),
            self.device.limited(tensor_bytes, step.held_tensors()),
        ):
            step.ims_per_gpu = len(batches[0])
            try:
                for batch in batches:
                    step.attempt(batch)
            except AgreedOutOfMemoryError as error:
                fits, reason = False, error.reason
            except Exception as error:
                # Where the limit is below what is held already, no rank gets to agree.
                if not is_out_of_memory(error):
                    raise
                fits, reason = False, str(error)
            live, reserved = self.device.peaks()
            step.optimizer.zero_grad()
        return _worst_of_ranks(Trial(len(batches[0]), fits, live, reserved, reason))


def _worst_of_ranks(trial: Trial) -> Trial:
    trials = ranks.gather_objects(trial)
    return Trial(
        trial.ims_per_gpu,
        all(other.fits for other in trials),
        max(other.live_bytes for other in trials),
        max(other.reserved_bytes for other in trials),
        next((other.reason for other in trials if other.reason), ""),
    )


def measure_workload(
    workload: Workload, device: Device, *, budget_bytes: int, most_images: int
) -> MemoryProfile:
    """Predict and measure a training. All ranks must call it; all return the same profile.

    Args:
        workload: the training.
        device: this rank's.
        budget_bytes: memory of this rank's device that training may take.
        most_images: no more images per GPU than this are wanted.

    Raises:
        Exception: see :meth:`Probe.measure`.
    """
    # Where values decide, as in sampling, the ranks may have counted differently.
    predicted = ranks.broadcast_object(predict(workload).profile(workload, caching=device.caches))
    probe = Probe(device, workload.build_step(device.device), workload.trial_batches)
    measurement = probe.measure(predicted, budget_bytes, limit=most_images)
    sizes = ", ".join(str(trial.ims_per_gpu) for trial in measurement.trials)
    return measured_profile(
        predicted,
        measurement,
        f"{workload.description}; measured on {device.name}, {ranks.world_size()} ranks, with "
        f"{sizes} images",
    )


def measured_profile(
    predicted: MemoryProfile, measurement: Measurement, description: str
) -> MemoryProfile:
    """Scale the prediction so that it says what was measured, at the budget of the measurement.

    If nothing fitted, one image of the profile takes more than the budget.
    """
    budget_bytes, world_size = measurement.budget_bytes, ranks.world_size()
    base = replace(
        predicted,
        context_bytes=measurement.context_bytes,
        source=MEASURED,
        description=description,
        points=tuple(
            Point(trial.ims_per_gpu, trial.live_bytes, trial.reserved_bytes)
            for trial in measurement.trials
            if trial.fits
        ),
    )
    fixed = base.peak_bytes(0, world_size=world_size) - max(p.static_bytes for p in base.phases)
    room = budget_bytes - fixed
    if measurement.largest == 0:
        logger.warning("One image per GPU does not fit: %s", measurement.trials[-1].reason)
        too_much = Phase("measured", 0, max(1, room + 1))
        return replace(base, phases=(*base.phases, too_much))
    border = any(trial.ims_per_gpu == measurement.largest + 1 for trial in measurement.trials)
    # Halfway between what fits and what does not, or right at what fits.
    at = measurement.largest + (0.5 if border else 0.0)
    factor = room / (base.peak_bytes(at, world_size=world_size) - fixed)
    phases = tuple(
        Phase(p.name, int(p.static_bytes * factor), int(p.bytes_per_image * factor))
        for p in base.phases
    )
    # Where the optimizer's step is the peak, the lines alone would allow more than was seen.
    return replace(base, phases=(*phases, Phase("measured", 0, int(room / at))))


def _expected_most(predicted: MemoryProfile, trial: Trial, tensor_bytes: int) -> int:
    """Images that should fit if the prediction is as far off for all as it was for the trial."""
    world_size = ranks.world_size()
    predicted_bytes = predicted.peak_bytes(trial.ims_per_gpu, world_size=world_size)
    error_bytes = trial.reserved_bytes - predicted_bytes
    return predicted.largest_ims_per_gpu(tensor_bytes - error_bytes, world_size=world_size)
