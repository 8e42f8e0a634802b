"""Counting a training in the schedule's iterations, by what each optimizer step is worth.

By the gain rule a schedule stays as the recipe wrote it and is read at tau, the recipe's steps
done: a step is worth r of them, and its learning rate is r times the schedule's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from d2scale.config.keys import get_key
from d2scale.planning.gain import gain_of, recipe_steps
from d2scale.planning.schedule import follows_gain, recipe_ims_per_batch
from d2scale.step.micro_batches import StepLosses
from d2scale.step.noise import NoiseAverage

# Every step measures until the average has settled.
_STEPS_TO_SETTLE = 20
# Measuring costs time, above all where a step in one part is cut for it. An average covers about
# ten measurements: so far apart that they cover a hundredth of the training, and at most this far.
_MOST_STEPS_APART = 10
_APARTS_IN_A_TRAINING = 1000
# Of plain detectron2, which has no key for it.
_WRITER_PERIOD = 20


class StepClock:
    """What a training has done, in optimizer steps and in iterations of its schedule.

    Without the gain rule every step is worth one iteration.

    Args:
        recipe_ims_per_batch: images in a step of the recipe, for the gain rule; None: no gain rule.
        max_iter: iterations of the schedule.
        measured_period: steps between two measurements where the rule needs none; 0: no more.
        average: of the noise, before the first measurement.
    """

    def __init__(
        self,
        *,
        recipe_ims_per_batch: int | None = None,
        max_iter: int = 0,
        measured_period: int = 0,
        average: NoiseAverage | None = None,
    ) -> None:
        self.recipe_ims_per_batch = recipe_ims_per_batch
        self.steps = 0  # taken
        self.iterations = 0.0  # of the schedule that are done; by the gain rule tau
        self.recipe_images = 0.0  # of the recipe's training that they are worth
        self.gain = 1.0  # of the last step
        self.average = average or NoiseAverage()
        self._max_iter = max_iter
        self._measured_period = measured_period
        self._next = (self.gain, 0, self.average)

    @property
    def iteration(self) -> int:
        """The number of the iteration, from 0, in which the last step has ended."""
        ended = math.ceil(self.iterations)
        # The last step may be worth more than is left.
        return (min(ended, self._max_iter) if self._max_iter else ended) - 1

    @property
    def number(self) -> int:
        """The number of the next step, from 0; without the gain rule it is the iteration."""
        return self.steps if self.recipe_ims_per_batch else int(self.iterations)

    @property
    def noise_scale(self) -> float | None:
        """The average noise scale in images, None before the first measurement."""
        noise = self.average.value
        return None if noise is None else noise.scale

    def measures(self, *, one_part: bool) -> bool:
        """Return whether the next step should measure. ``one_part``: it must be cut to do so."""
        if self.recipe_ims_per_batch is None:
            due = self._measured_period and (self.steps + 1) % self._measured_period == 0
            return bool(due) and not one_part
        if self.steps < _STEPS_TO_SETTLE:
            return True
        apart = max(1, min(_MOST_STEPS_APART, self._max_iter // _APARTS_IN_A_TRAINING))
        return self.steps % apart == 0

    def gain_with(self, losses: StepLosses) -> float:
        """Return the gain of the running step, with what it has measured.

        Nothing counts until :meth:`advance`, so that a step may be taken again.
        """
        average, gain = self.average.updated(losses.noise), 1.0
        if self.recipe_ims_per_batch is not None:
            noise = average.value
            if noise is None:  # as cautious as can be
                gain = min(1.0, losses.images / self.recipe_ims_per_batch)
            else:
                gain = gain_of(noise.scale, losses.images, self.recipe_ims_per_batch)
        self._next = (gain, losses.images, average)
        return gain

    def advance(self) -> None:
        """Count the step for which :meth:`gain_with` was called last."""
        self.gain, images, self.average = self._next
        self.steps += 1
        if self.recipe_ims_per_batch is None:
            self.recipe_images += images
            self.iterations += 1
        else:
            self.recipe_images += self.gain * self.recipe_ims_per_batch
            self.iterations = recipe_steps(self.recipe_images, self.recipe_ims_per_batch)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {
            "steps": self.steps,
            "recipe_images": self.recipe_images,
            "gain": self.gain,
            "noise": self.average.state_dict(),
        }

    def resume(self, iterations: float, images: float, state: Mapping[str, Any] | None) -> None:
        """Go on after ``iterations`` of this schedule, worth ``images`` of the recipe's training.

        ``state`` is that of a checkpoint, None if it has none.
        """
        self.iterations, self.recipe_images = iterations, images
        self.steps = math.ceil(iterations)
        if state is not None:
            self.steps, self.gain = int(state["steps"]), float(state["gain"])
            self.average = NoiseAverage.from_state_dict(state["noise"], self.average.decay)


def build_clock(cfg: Any) -> StepClock:
    """Return the clock of a training that begins; ``cfg`` is as planned."""
    return StepClock(
        recipe_ims_per_batch=recipe_ims_per_batch(cfg) if follows_gain(cfg) else None,
        max_iter=cfg.SOLVER.MAX_ITER,
        measured_period=get_key(cfg, "WRITER_PERIOD", _WRITER_PERIOD),
    )
