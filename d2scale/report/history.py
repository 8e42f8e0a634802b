"""Metrics over a training, read from ``metrics.json`` or TensorBoard events."""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from d2scale.coco.annotation_file import examples
from d2scale.run_folder.files import METRICS_FILE

EVENT_FILES = "events.out.tfevents.*"

Axis = Literal["images", "iterations", "time"]
# What curves are drawn against, with its title; the first is shown until a reader chooses another.
AXES: dict[Axis, str] = {"images": "images seen", "iterations": "iterations", "time": "time"}

_LARGEST = 2.0**128  # of float32
# Positions on the axes, not curves.
_PLACES = ("iteration", "steps", "images_seen", "elapsed_seconds", "wall_time")


class Row(NamedTuple):
    """The metrics at one moment of a training."""

    iteration: int  # the last one done, from 0; by the gain rule of the recipe's
    steps: float  # that the optimizer took
    images_seen: float  # since the training began; nan if unknown
    seconds: float  # of training until then; nan if unknown
    values: Mapping[str, float]  # scalars by name; nan where the file has null or no finite value


@dataclass(frozen=True)
class History:
    """Metrics over a training."""

    rows: tuple[Row, ...] = ()  # by ascending images seen
    notes: tuple[str, ...] = ()  # what is wrong with the files, or had to be computed

    def names(self) -> tuple[str, ...]:
        """Return every scalar's name, in order of appearance."""
        return tuple(dict.fromkeys(name for row in self.rows for name in row.values))

    def curve(self, name: str, axis: Axis = "images") -> tuple[np.ndarray, np.ndarray]:
        """Return places on the axis, of time in seconds, and finite values: shape (points,)."""
        rows = [row for row in self.rows if name in row.values]
        places = {
            "images": [row.images_seen for row in rows],
            "iterations": [row.iteration + 1 for row in rows],
            "time": [row.seconds for row in rows],
        }
        points = np.array([places[axis], [row.values[name] for row in rows]], dtype=np.float64)
        finite = points[:, np.isfinite(points).all(axis=0)]
        return finite[0], finite[1]

    def last(self, name: str) -> float | None:
        """Return the last value of a scalar; None without any."""
        return self._reduce(name, lambda values: values[-1])

    def largest(self, name: str) -> float | None:
        """Return the largest value of a scalar; None without any."""
        return self._reduce(name, np.max)

    def mean(self, name: str) -> float | None:
        """Return the mean value of a scalar; None without any."""
        return self._reduce(name, np.mean)

    def _reduce(self, name: str, function: Callable[[np.ndarray], Any]) -> float | None:
        _, values = self.curve(name, "iterations")
        return float(function(values)) if len(values) else None


def read_history(folder: Path, ims_per_batch: int | None) -> History:
    """Read ``metrics.json``, or TensorBoard events where there is none.

    For files without the images seen, these are computed from ``ims_per_batch``.
    """
    notes: list[str] = []
    lines = _read_json_lines(folder / METRICS_FILE, notes)
    if not lines and any(folder.glob(EVENT_FILES)):
        notes.append(f"{METRICS_FILE} holds no metrics; TensorBoard events are read instead")
        lines = _read_events(folder, notes)
    return _to_history(lines, ims_per_batch, notes)


def _read_json_lines(path: Path, notes: list[str]) -> list[dict[str, float]]:
    lines, broken = [], []
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        notes.append(f"{path.name} cannot be read ({error.strerror})")
        return []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            lines.append({**_scalars(content), "iteration": int(content["iteration"])})
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            broken.append(str(number))
    if broken:
        what = "line" if len(broken) == 1 else "lines"
        notes.append(f"{path.name}: {what} {examples(broken)} cannot be read and left out")
    return lines


def _scalars(content: Mapping[str, Any]) -> dict[str, float]:
    numbers = {name: math.nan if value is None else value for name, value in content.items()}
    return {
        # What float32 cannot hold was no metric, and its sums would overflow.
        name: float(value) if abs(value) < _LARGEST else math.nan
        for name, value in numbers.items()
        if isinstance(value, (int, float)) and (name not in _PLACES or abs(value) < _LARGEST)
    }


def _read_events(folder: Path, notes: list[str]) -> list[dict[str, float]]:
    """Read TensorBoard's scalars, one line a step, with the clock as ``wall_time``."""
    from tensorboard.backend.event_processing import event_accumulator

    sizes = {event_accumulator.SCALARS: 0}  # 0 keeps all of them
    accumulator = event_accumulator.EventAccumulator(str(folder), size_guidance=sizes)
    try:
        accumulator.Reload()
    except Exception as error:  # a foreign format has no errors of its own
        notes.append(f"TensorBoard events cannot be read ({type(error).__name__})")
        return []
    lines: dict[int, dict[str, float]] = {}
    for tag in accumulator.Tags().get("scalars", []):
        for event in accumulator.Scalars(tag):
            line = lines.setdefault(event.step, {"iteration": event.step})
            line[tag] = float(event.value)
            line["wall_time"] = float(event.wall_time)
    return [lines[step] for step in sorted(lines)]


def _to_history(
    lines: Sequence[Mapping[str, float]], ims_per_batch: int | None, notes: list[str]
) -> History:
    rows: list[dict[str, float]] = []
    repeated = 0
    # By the gain rule iterations are the recipe's. Lines of training record steps and images,
    # those of an evaluation by d2go do not.
    steps_at, images_at = _counter(lines, "steps"), _counter(lines, "images_seen")
    for line in lines:
        row = dict(line)
        if "images_seen" not in row and rows and not _is_step(row):
            # detectron2 numbers the evaluation after the last step as one more.
            row["iteration"] = min(row["iteration"], rows[-1]["iteration"])
        done = row["iteration"]
        row.setdefault("steps", steps_at(done) if steps_at else done + 1)
        images = images_at(done) if images_at else row["steps"] * (ims_per_batch or math.nan)
        row.setdefault("images_seen", images)
        if _is_step(row):
            # A resumed run repeats the steps after its checkpoint.
            kept = bisect_right(rows, _key(row), key=_key)
            repeated += len(rows) - kept
            del rows[kept:]
        _insert(rows, row)
    if lines and not images_at:
        notes.append(
            "the images seen are not recorded; they are steps times IMS_PER_BATCH"
            if ims_per_batch
            else "neither the images seen nor IMS_PER_BATCH are known: no axis of images"
        )
    if repeated:
        notes.append(f"lines of steps that a resumed run repeated are left out ({repeated})")
    history = []
    for row, seconds in zip(rows, _seconds(rows, notes), strict=True):
        values = {name: value for name, value in row.items() if name not in _PLACES}
        places = int(row["iteration"]), row["steps"], row["images_seen"]
        history.append(Row(*places, seconds, values))
    return History(tuple(history), tuple(notes))


def _counter(lines: Sequence[Mapping[str, float]], name: str) -> Callable[[float], float] | None:
    """Return what gives a count after an iteration, by the lines that record it; None without."""
    known = {line["iteration"] + 1: line[name] for line in lines if name in line}
    if not known:
        return None
    iterations = sorted(known)
    places, counts = [0.0, *iterations], [0.0, *(known[each] for each in iterations)]
    return lambda iteration: float(np.interp(iteration + 1, places, counts))


def _key(row: Mapping[str, float]) -> float:
    """Return what grows over a training: a resumed run may count iterations of another batch."""
    images = row["images_seen"]
    return images if math.isfinite(images) else row["iteration"]


def _is_step(row: Mapping[str, float]) -> bool:
    """Return whether a line is about training, not only about an evaluation."""
    return "total_loss" in row or "lr" in row


def _insert(rows: list[dict[str, float]], row: dict[str, float]) -> None:
    """Insert a line by images seen: detectron2 writes evaluations after the steps that follow."""
    place = bisect_right(rows, _key(row), key=_key)
    if place and _key(rows[place - 1]) == _key(row):
        same = rows[place - 1]
        # A step ends before it is evaluated.
        kept = {name: same[name] for name in _PLACES if _is_step(same) and name in same}
        same.update({**row, **kept})
    else:
        rows.insert(place, row)


def _seconds(rows: list[dict[str, float]], notes: list[str]) -> list[float]:
    """Return seconds of training until each row."""
    if rows and all("elapsed_seconds" in row for row in rows):
        return [row["elapsed_seconds"] for row in rows]
    if rows and all("wall_time" in row for row in rows):
        notes.append("wall time is TensorBoard's clock, from the first event on, pauses included")
        return [row["wall_time"] - rows[0]["wall_time"] for row in rows]
    if rows:
        notes.append("wall time is not known; it is the sum of the step times, without evaluations")
    seconds, total, before, last = [], 0.0, 0.0, math.nan
    for row in rows:
        last = row.get("time", last)
        if math.isfinite(last):
            total += last * max(row["steps"] - before, 0.0)
        before = row["steps"]
        seconds.append(total if math.isfinite(last) else math.nan)
    return seconds
