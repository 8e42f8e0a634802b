"""Report the metrics of a training: a log line or progress bar, metrics.json, TensorBoard."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence

import torch
from tqdm import tqdm

from d2scale.engine.telemetry.logs import METRICS_LOGGER, on_terminal
from d2scale.engine.telemetry.metrics import MetricHistory, StepMetrics
from d2scale.engine.telemetry.writers import Writer
from d2scale.step.ranks import largest_over_ranks


class Reporter:
    """Writes medians of the metrics every ``period`` steps and at the end; a hook of every rank.

    On a terminal a bar moves with every step; elsewhere the log has a line for each report. Times
    and memory are those of the slowest and the fullest rank.

    """

    def __init__(
        self,
        writers: Sequence[Writer],  # closed with the reporter; none on all ranks but the first
        device: torch.device,
        *,
        period: int,  # steps between two reports, and the window of the medians
        start_iteration: int,
        max_iter: int,
        bar: bool = True,  # if there is a terminal
    ) -> None:
        self._writers = writers
        self._device = device
        self._period = period
        self._max_iter = max_iter
        self._history = MetricHistory(period, max_iter)
        self._logger = logging.getLogger(METRICS_LOGGER)
        # tqdm's own lock is for processes that share a bar: a rank that is ended would leak it.
        tqdm.set_lock(threading.RLock())
        self._bar = tqdm(
            total=max_iter,
            initial=start_iteration,
            unit="step",
            dynamic_ncols=True,
            disable=not (bar and on_terminal()),
        )

    def __call__(self, step: StepMetrics) -> None:
        self._history.add(step)
        loss = sum(step.losses.values())
        self._bar.set_postfix(loss=f"{loss:.4g}", lr=f"{step.lr:.3g}", refresh=False)
        self._bar.update(min(step.iteration + 1, self._max_iter) - self._bar.n)
        if step.steps % self._period and step.iterations < self._max_iter:
            return
        values = self._history.times()
        if self._device.type == "cuda":
            values["max_mem_mb"] = torch.cuda.max_memory_allocated(self._device) / 2**20
            values["max_reserved_mb"] = torch.cuda.max_memory_reserved(self._device) / 2**20
        values = largest_over_ranks(values)
        self._logger.info(self._history.line(values))
        self.write(step.iteration, {**self._history.scalars(), **values})

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Pass ``scalars`` to all writers."""
        for writer in self._writers:
            writer.write(iteration, scalars)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()
        for writer in self._writers:
            writer.close()
