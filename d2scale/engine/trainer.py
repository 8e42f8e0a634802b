"""The training loop: a rank's share of a step, its micro-batches, one update."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.amp.grad_scaler import GradScaler

from d2scale.engine.solver import GradientClipper, LearningRateSchedule
from d2scale.engine.telemetry.abnormal import (
    NotFiniteLossError,
    SkippedSteps,
    check_finite,
    write_down,
)
from d2scale.engine.telemetry.writers import StepMetrics
from d2scale.step.guard import OomGuard
from d2scale.step.micro_batches import MicroBatch, MicroBatchStep, StepLosses, cut
from d2scale.step.ranks import rank

logger = logging.getLogger(__name__)

AfterStep = Callable[[StepMetrics], None]


class Trainer:
    """Takes optimizer steps.

    Args:
        step: forward and backward of a step.
        data: this rank's share of each step, endlessly.
        micro_batch_sizes: images in each micro-batch of this rank; their sum is the share.
        optimizer: what is updated.
        schedule: its learning rates.
        seed: what chance inside the model (dropout, say) is drawn from.
        clip: applied to the gradients of the whole step.
        scaler: the one that ``step`` scales with.
        guard: takes the steps in place of ``step``, and decides on the micro-batches.
        folder: where a step whose loss is not finite is written down; None: nowhere.
        images_before: images that earlier runs have shown, with ``start_iteration``.
        start_iteration: first step.
    """

    def __init__(
        self,
        step: MicroBatchStep,
        data: Iterator[MicroBatch],
        micro_batch_sizes: Sequence[int],
        optimizer: torch.optim.Optimizer,
        schedule: LearningRateSchedule,
        *,
        seed: int,
        clip: GradientClipper | None = None,
        scaler: GradScaler | None = None,
        guard: OomGuard | None = None,
        folder: Path | None = None,
        start_iteration: int = 0,
        images_before: int = 0,
    ) -> None:
        self._step = step
        self._data = data
        self._sizes = tuple(micro_batch_sizes)
        self._optimizer = optimizer
        self._schedule = schedule
        self._seed = seed
        self._clip = clip
        self._scaler = scaler
        self._skipped = None if scaler is None else SkippedSteps(scaler)
        self._guard = guard
        self._folder = folder
        self.next_iteration = start_iteration
        self._images_seen = images_before

    def train(self, max_iter: int, after_step: Iterable[AfterStep]) -> None:
        """Take steps until ``max_iter`` are done, and tell each to every ``after_step``.

        Raises:
            D2ScaleError: if the loss is not finite, or a step does not fit into memory (the
                weights are those before that step), or a scaler skips step after step.
        """
        actions = tuple(after_step)
        while self.next_iteration < max_iter:
            metrics = self.take_step()
            for action in actions:
                action(metrics)

    def take_step(self) -> StepMetrics:
        """Take one optimizer step."""
        iteration = self.next_iteration
        start = time.perf_counter()
        share = next(self._data)
        data_seconds = time.perf_counter() - start
        if self._skipped is not None:
            self._skipped.check(iteration)
        lr = self._schedule.set(iteration)
        seed_step(self._seed, iteration)

        def finish(losses: StepLosses) -> None:
            check_finite(losses.losses, iteration, lr)
            self._update()

        try:
            result = self._take(share, finish)
        except NotFiniteLossError as error:
            if self._folder is not None:
                write_down(error, share, self._folder)
            raise
        self.next_iteration = iteration + 1
        self._images_seen += result.images
        return StepMetrics(
            iteration=iteration,
            losses=result.losses,
            lr=lr,
            seconds=time.perf_counter() - start,
            data_seconds=data_seconds,
            images_seen=self._images_seen,
        )

    def _take(self, share: MicroBatch, finish: Callable[[StepLosses], None]) -> StepLosses:
        if self._guard is not None:
            return self._guard(share, finish)
        self._optimizer.zero_grad()
        result = self._step(cut(share, self._sizes))
        finish(result)
        return result

    def _update(self) -> None:
        if self._scaler is not None:
            self._scaler.unscale_(self._optimizer)
        if self._clip is not None:
            self._clip(
                parameter
                for group in self._optimizer.param_groups
                for parameter in group["params"]
                if parameter.grad is not None
            )
        if self._scaler is None:
            self._optimizer.step()
        else:
            # Leaves out a step whose scaled gradients have overflowed, and lowers the scale.
            self._scaler.step(self._optimizer)
            self._scaler.update()


def seed_step(seed: int, iteration: int) -> None:
    """Seed torch for one step of this rank, so that a resumed run draws what it would have."""
    words = np.random.SeedSequence(seed, spawn_key=(iteration, rank())).generate_state(1)
    torch.manual_seed(int(words[0]))
