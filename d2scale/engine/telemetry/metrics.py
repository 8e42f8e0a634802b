"""The metrics of one optimizer step, and their medians over the past steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from fvcore.common.history_buffer import HistoryBuffer

# Steps whose median says how long the rest will take.
_ETA_WINDOW = 1000
_SECONDS_AN_ITERATION = "seconds an iteration"


@dataclass(frozen=True)
class StepMetrics:
    """The metrics of one optimizer step."""

    iteration: int  # of the schedule in which the step has ended, from 0
    losses: Mapping[str, float]  # by name, over the whole step
    lr: float
    seconds: float  # duration of the step on this rank, waiting for data included
    data_seconds: float  # the part of it spent waiting for data
    images_seen: int  # since the training began, this step included
    iterations_before: float  # of the schedule that were done before the step
    iterations: float  # that are done now
    steps: int  # taken in the training, this one included
    gain: float | None = None  # iterations that the step was worth, by the gain rule
    noise_scale: float | None = None  # images; None before the first measurement


def is_due(step: StepMetrics, period: int) -> bool:
    """Return whether the step has reached iterations that ``period`` divides; with 0 never."""
    return period > 0 and step.iterations // period > step.iterations_before // period


class MetricHistory:
    """Medians over ``window`` past steps of losses and times, in a training of ``max_iter``."""

    def __init__(self, window: int, max_iter: int) -> None:
        self._window = window
        self._max_iter = max_iter
        self._buffers: dict[str, HistoryBuffer] = {}
        self._last: StepMetrics | None = None

    def add(self, step: StepMetrics) -> None:
        """Add a step."""
        values = {
            "total_loss": sum(step.losses.values()),
            **step.losses,
            "time": step.seconds,
            "data_time": step.data_seconds,
            _SECONDS_AN_ITERATION: step.seconds / (step.iterations - step.iterations_before),
        }
        for name, value in values.items():
            buffer = self._buffers.setdefault(name, HistoryBuffer(_ETA_WINDOW))
            buffer.update(value, step.steps)
        self._last = step

    def times(self) -> dict[str, float]:
        """Return seconds of a step, and of its wait for data: medians on this rank."""
        return {name: self._median(name) for name in ("time", "data_time")}

    def scalars(self) -> dict[str, float]:
        """Return what ``metrics.json`` shows after the last step, under detectron2's names."""
        assert self._last is not None
        left = max(0.0, self._max_iter - self._last.iterations)
        seconds_an_iteration = self._buffers[_SECONDS_AN_ITERATION].median(_ETA_WINDOW)
        return {
            **self._noise(),
            **{name: self._median(name) for name in ("total_loss", *self._last.losses)},
            **self.times(),
            "lr": self._last.lr,
            "eta_seconds": float(seconds_an_iteration) * left,
            "images_seen": self._last.images_seen,
            "steps": self._last.steps,
        }

    def _noise(self) -> dict[str, float]:
        """Return the noise scale, if it was measured, and what the gain rule counts."""
        last = self._last
        assert last is not None
        values = {"noise_scale": last.noise_scale}
        if last.gain is not None:
            values |= {"gain": last.gain, "recipe_steps": last.iterations}
        return {name: value for name, value in values.items() if value is not None}

    def line(self, extra: Mapping[str, float]) -> str:
        """Return detectron2's log line; ``extra`` may hold ``max_mem_mb``."""
        assert self._last is not None
        scalars = self.scalars()
        parts = [
            f"eta: {timedelta(seconds=int(scalars['eta_seconds']))}",
            f"iter: {self._last.iteration}",
            *(f"{name}: {scalars[name]:.4g}" for name in ("total_loss", *self._last.losses)),
            f"time: {self._buffers['time'].global_avg():.4f}",
            f"last_time: {self._last.seconds:.4f}",
            f"data_time: {self._buffers['data_time'].avg(self._window):.4f}",
            f"last_data_time: {self._last.data_seconds:.4f}",
            f"lr: {self._last.lr:.5g}",
            *(f"{name}: {value:.4g}" for name, value in self._noise().items()),
        ]
        if "max_mem_mb" in extra:
            parts.append(f"max_mem: {extra['max_mem_mb']:.0f}M")
        return " " + "  ".join(parts)

    def _median(self, name: str) -> float:
        return float(self._buffers[name].median(self._window))
