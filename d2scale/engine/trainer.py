"""The training loop: load this rank's batch, take an optimizer step, run the hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from d2scale.engine.solver import LearningRateSchedule
from d2scale.engine.telemetry import abnormal
from d2scale.engine.telemetry.metrics import StepMetrics
from d2scale.step.clock import StepClock
from d2scale.step.micro_batches import MicroBatch, StepLosses
from d2scale.step.optimizer_step import OptimizerStep
from d2scale.step.ranks import rank

Hook = Callable[[StepMetrics], None]


class Trainer:
    """Takes optimizer steps, one after another."""

    def __init__(
        self,
        step: OptimizerStep,
        data: Iterator[MicroBatch],  # this rank's images of each step, endlessly
        schedule: LearningRateSchedule,
        *,
        seed: int,  # of random draws inside the model (dropout, say)
        folder: Path | None = None,  # gets the images of a step whose loss is not finite
        clock: StepClock | None = None,  # where the training stands; None: at its beginning
        images_before: int = 0,  # that earlier runs have shown
    ) -> None:
        self._step = step
        self._data = data
        self._schedule = schedule
        self._seed = seed
        scaler = step.options.scaler
        self._skipped_steps = None if scaler is None else abnormal.SkippedSteps(scaler)
        self._folder = folder
        self.clock = clock or StepClock()
        self.images_seen = images_before

    def train(self, max_iter: int, hooks: Sequence[Hook]) -> None:
        """Take steps until ``max_iter`` iterations are done, and call all hooks after each step.

        Raises D2ScaleError if the loss is not finite, or a step does not fit into memory (the
        weights are those before that step), or a scaler skips step after step.
        """
        while self.clock.iterations < max_iter:
            metrics = self.take_step()
            for hook in hooks:
                hook(metrics)

    @property
    def next_iteration(self) -> int:
        """The iteration of the schedule in which the next step begins, from 0."""
        return int(self.clock.iterations)

    def take_step(self) -> StepMetrics:
        """Take one optimizer step."""
        clock, iteration, done = self.clock, self.next_iteration, self.clock.iterations
        start = time.perf_counter()
        rank_batch = next(self._data)
        data_seconds = time.perf_counter() - start
        lr = self._schedule.set(done)
        seed_step(self._seed, clock.number)

        def before_update(losses: StepLosses) -> None:
            nonlocal lr
            abnormal.check_finite(losses.losses, iteration, lr)
            if self._skipped_steps is not None:
                self._skipped_steps.check(iteration, clock.number)
            gain = clock.gain_with(losses)
            lr = self._schedule.set(done, gain)
            self._step.set_gain(gain)

        measure = clock.measures(one_part=self._step.is_one_part(rank_batch))
        try:
            result = self._step(rank_batch, before_update, measure=measure, number=clock.number)
        except abnormal.NotFiniteLossError as error:
            if self._folder is not None:
                abnormal.write_not_finite_step(error, rank_batch, self._folder)
            raise
        clock.advance()
        self.images_seen += result.images
        return StepMetrics(
            iteration=clock.iteration,
            iterations_before=done,
            iterations=clock.iterations,
            steps=clock.steps,
            losses=result.losses,
            lr=lr,
            seconds=time.perf_counter() - start,
            data_seconds=data_seconds,
            images_seen=self.images_seen,
            gain=clock.gain if clock.recipe_ims_per_batch else None,
            noise_scale=clock.noise_scale,
        )


def seed_step(seed: int, iteration: int) -> None:
    """Seed torch for one step of this rank, so that a resumed run draws what it would have."""
    words = np.random.SeedSequence(seed, spawn_key=(iteration, rank())).generate_state(1)
    torch.manual_seed(int(words[0]))
