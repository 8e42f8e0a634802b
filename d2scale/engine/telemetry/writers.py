"""What a run tells about itself: ``metrics.json``, TensorBoard events, log lines, a bar."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, Protocol

from fvcore.common.history_buffer import HistoryBuffer
from tqdm import tqdm

from d2scale.engine.telemetry.logs import METRICS_LOGGER, on_terminal
from d2scale.run_folder.files import METRICS_FILE, write_atomically

# Steps whose median says how long the rest will take.
_ETA_WINDOW = 1000


@dataclass(frozen=True)
class StepMetrics:
    """What one optimizer step has to tell.

    Attributes:
        iteration: number of the step, from 0.
        losses: by name, over the whole step.
        lr: learning rate of the step.
        seconds: duration of the step on this rank, waiting for data included.
        data_seconds: the part of it spent waiting for data.
        images_seen: images since the training began, this step included.
    """

    iteration: int
    losses: Mapping[str, float]
    lr: float
    seconds: float
    data_seconds: float
    images_seen: int


class MetricHistory:
    """The metrics of past steps, summed up over a window.

    Args:
        window: steps whose median stands for losses and times.
        max_iter: steps of the whole training.
    """

    def __init__(self, window: int, max_iter: int) -> None:
        self._window = window
        self._max_iter = max_iter
        self._buffers: dict[str, HistoryBuffer] = {}
        self._last: StepMetrics | None = None

    def put(self, step: StepMetrics) -> None:
        """Add a step."""
        values = {
            "total_loss": sum(step.losses.values()),
            **step.losses,
            "time": step.seconds,
            "data_time": step.data_seconds,
        }
        for name, value in values.items():
            buffer = self._buffers.setdefault(name, HistoryBuffer(_ETA_WINDOW))
            buffer.update(value, step.iteration)
        self._last = step

    def times(self) -> dict[str, float]:
        """Return seconds of a step, and of its wait for data: medians on this rank."""
        return {name: self._median(name) for name in ("time", "data_time")}

    def scalars(self) -> dict[str, float]:
        """Return what ``metrics.json`` says after the last step, under detectron2's names."""
        assert self._last is not None
        names = ("total_loss", *self._last.losses, "time", "data_time")
        left = self._max_iter - self._last.iteration - 1
        return {
            **{name: self._median(name) for name in names},
            "lr": self._last.lr,
            "eta_seconds": float(self._buffers["time"].median(_ETA_WINDOW)) * left,
            "images_seen": self._last.images_seen,
        }

    def line(self, extra: Mapping[str, float]) -> str:
        """Return detectron2's log line; ``extra`` may hold ``max_mem_mb``."""
        assert self._last is not None
        scalars = self.scalars()
        losses = [f"{n}: {scalars[n]:.4g}" for n in ("total_loss", *self._last.losses)]
        parts = [
            f"eta: {timedelta(seconds=int(scalars['eta_seconds']))}",
            f"iter: {self._last.iteration}",
            *losses,
            f"time: {self._buffers['time'].global_avg():.4f}",
            f"last_time: {self._last.seconds:.4f}",
            f"data_time: {self._buffers['data_time'].avg(self._window):.4f}",
            f"last_data_time: {self._last.data_seconds:.4f}",
            f"lr: {self._last.lr:.5g}",
        ]
        if "max_mem_mb" in extra:
            parts.append(f"max_mem: {extra['max_mem_mb']:.0f}M")
        return " " + "  ".join(parts)

    def _median(self, name: str) -> float:
        return float(self._buffers[name].median(self._window))


class Writer(Protocol):
    """Takes the scalars of an iteration somewhere."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonWriter:
    """Appends one JSON object to ``metrics.json`` for each call, as detectron2 does.

    Each holds ``elapsed_seconds``: how long the training has been running, evaluations included;
    a resumed run goes on from its last line, so the time between two runs does not count.

    Args:
        folder: the run's. The clock starts now.
        start_iteration: first step of this run.
        images_before: images that the training has seen. Lines of later ones are of steps that
            a resumed run repeats: they go, and so does a line that a kill has cut. A line that
            tells no images is judged by its iteration.
    """

    def __init__(self, folder: Path, start_iteration: int = 0, images_before: int = 0) -> None:
        path = folder / METRICS_FILE
        elapsed = _forget_later_lines(path, start_iteration, images_before)
        self._started = time.monotonic() - elapsed
        self._file: IO[str] = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        # JSON has no word for what is not a number, such as AP of a class without ground truth.
        values = {k: value if math.isfinite(value) else None for k, value in scalars.items()}
        values["elapsed_seconds"] = round(time.monotonic() - self._started, 3)
        line = json.dumps({**values, "iteration": iteration}, sort_keys=True)
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _forget_later_lines(path: Path, start_iteration: int, images_before: int) -> float:
    """Return the seconds of training until the last line that stays."""
    if not path.exists():
        return 0.0
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if _is_before(line, start_iteration, images_before)]
    if len(kept) < len(lines):
        write_atomically(path, "".join(kept))
    seconds = json.loads(kept[-1]).get("elapsed_seconds") if kept else None
    return float(seconds) if isinstance(seconds, (int, float)) else 0.0


def _is_before(line: str, start_iteration: int, images_before: int) -> bool:
    with suppress(ValueError, KeyError, TypeError):
        if not line.endswith("\n"):
            return False
        content = json.loads(line)
        if "images_seen" in content:
            # Steps of another total batch had other numbers.
            return content["images_seen"] <= images_before
        return content["iteration"] < start_iteration
    return False


class TensorBoardWriter:
    """Writes TensorBoard events into the run's folder."""

    def __init__(self, folder: Path, start_iteration: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # TensorBoard hides what an interrupted run had written beyond this point.
        purge_step = start_iteration or None
        self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Reporter:
    """Collects the metrics of a run and tells them when asked.

    On a terminal a bar moves with every step; elsewhere the log shows a line for each report.

    Args:
        writers: closed with the reporter; none on all ranks but the first.
        period: steps between two reports, and the window of the medians.
        start_iteration: first step of this run.
        max_iter: steps of the whole training.
        bar: show a bar, if there is a terminal.
    """

    def __init__(
        self,
        writers: Sequence[Writer],
        *,
        period: int,
        start_iteration: int,
        max_iter: int,
        bar: bool = True,
    ) -> None:
        self.history = MetricHistory(period, max_iter)
        self._writers = writers
        self._logger = logging.getLogger(METRICS_LOGGER)
        self._bar: tqdm[Any] | None = None
        if bar and on_terminal():
            self._bar = tqdm(
                total=max_iter, initial=start_iteration, unit="step", dynamic_ncols=True
            )

    def put(self, step: StepMetrics) -> None:
        """Take in a step."""
        self.history.put(step)
        if self._bar is not None:
            self._bar.set_postfix(
                loss=f"{sum(step.losses.values()):.4g}", lr=f"{step.lr:.3g}", refresh=False
            )
            self._bar.update()

    def report(self, iteration: int, extra: Mapping[str, float]) -> None:
        """Tell the state of the run; ``extra`` comes with it, and wins over this rank's view."""
        self._logger.info(self.history.line(extra))
        self.tell(iteration, {**self.history.scalars(), **extra})

    def tell(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Hand ``scalars`` to the writers as they are."""
        for writer in self._writers:
            writer.write(iteration, scalars)

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *exception: object) -> None:
        """Close the bar and the writers."""
        if self._bar is not None:
            self._bar.close()
        for writer in self._writers:
            writer.close()
