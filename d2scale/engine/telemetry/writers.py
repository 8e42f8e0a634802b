"""Write scalars to ``metrics.json`` and to TensorBoard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from d2scale.run_folder.files import METRICS_FILE, write_atomically


class JsonWriter:
    """Appends one JSON object to ``metrics.json`` for each call, as detectron2 does.

    Each holds ``elapsed_seconds``: how long the training has been running, evaluations included;
    a resumed run goes on from its last line, so the time between two runs does not count.

    The clock starts now. Lines of more than ``images_before`` images are of steps that a resumed
    run repeats: they are removed, and so is a line that a kill has cut. A line without images is
    judged by its iteration: whether it is before ``start_iteration``.
    """

    def __init__(self, folder: Path, start_iteration: int = 0, images_before: int = 0) -> None:
        path = folder / METRICS_FILE
        elapsed = _remove_later_lines(path, start_iteration, images_before)
        self._started = time.monotonic() - elapsed
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

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


def _remove_later_lines(path: Path, start_iteration: int, images_before: int) -> float:
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
        self._writer = SummaryWriter(str(folder), purge_step=start_iteration or None)

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


Writer = JsonWriter | TensorBoardWriter
