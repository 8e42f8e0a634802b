"""One training, as a report sees it: from a run folder of d2scale, detectron2 or d2go."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2scale.coco.accumulate import METRICS
from d2scale.config.loading import flatten, load_yaml
from d2scale.errors import ConfigError
from d2scale.report.history import History, Row, read_history
from d2scale.report.log_file import LogFacts, read_log
from d2scale.run_folder.contents import read_json
from d2scale.run_folder.files import CONFIG_FILE, MACHINE_FILE, PLAN_FILE

_RESULT = re.compile(r"^(?:(?P<prefix>.+)/)?bbox/(?P<metric>[^/].*)$")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        name: what tables and legends call it.
        folder: of the run; None for a published one.
        engine: d2scale, d2go, detectron2 or published.
        settings: the config as it was run, by dotted key; empty if it is not known.
        world_size: ranks; None if it is not known.
        plan: ``plan.json``; empty without one.
        machine: ``machine.json``; empty without one.
        history: metrics over the training.
        test_set: the dataset that the results are on; empty if it is not known.
        results: overall metrics in percent, by published column.
        class_results: AP of each class in percent.
        total_seconds: of training, evaluations in between included, the last excluded.
        seconds_per_iteration: mean.
        max_memory_mib: largest memory allocated on a GPU; None without one.
        notes: what is missing or had to be computed.
    """

    name: str
    folder: Path | None
    engine: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    world_size: int | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    history: History = field(default_factory=History)
    test_set: str = ""
    results: Mapping[str, float] = field(default_factory=dict)
    class_results: Mapping[str, float] = field(default_factory=dict)
    total_seconds: float | None = None
    seconds_per_iteration: float | None = None
    max_memory_mib: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def ims_per_batch(self) -> int | None:
        """Total batch."""
        return whole_number(self.settings.get("SOLVER.IMS_PER_BATCH"))

    @property
    def images_seen(self) -> float | None:
        """Images since the training began; of a published run by its settings."""
        if self.engine == "published":
            iterations = whole_number(self.settings.get("SOLVER.MAX_ITER"))
            return iterations * (self.ims_per_batch or math.nan) if iterations else None
        if not self.history.rows:
            return None
        images = self.history.rows[-1].images_seen
        return images if math.isfinite(images) else None

    @property
    def images_per_second(self) -> float | None:
        """Images of the total batch by the mean seconds of an iteration."""
        if not self.ims_per_batch or not self.seconds_per_iteration:
            return None
        return self.ims_per_batch / self.seconds_per_iteration


def whole_number(value: Any) -> int | None:
    """Return a positive whole number, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder. What is broken or missing is told in ``notes``, never raised.

    Args:
        folder: with any of ``metrics.json``, TensorBoard events, ``log.txt``, ``config.yaml``,
            ``plan.json`` and ``machine.json``.
        name: what to call the run.
    """
    notes: list[str] = []
    log = read_log(folder)
    settings = _read_config(folder, notes)
    engine = _engine(folder, settings)
    if engine == "d2go":
        # d2go writes the config as it was before scaling.
        settings.update(log.scaled)
    plan = _read(folder / PLAN_FILE, notes)
    ims_per_batch = whole_number(settings.get("SOLVER.IMS_PER_BATCH"))
    history = read_history(folder, ims_per_batch)
    results, class_results, dataset = _results(history, log, notes)
    speed = log.seconds_per_iteration or _seconds_per_iteration(history)
    return Run(
        name=name,
        folder=folder,
        engine=engine,
        settings=settings,
        world_size=_world_size(folder, engine, settings, plan, log),
        plan=plan,
        machine=_read(folder / MACHINE_FILE, notes),
        history=history,
        test_set=dataset or _evaluated(folder) or _first_test_set(settings),
        results=results,
        class_results=class_results,
        total_seconds=log.total_seconds or _total_seconds(history),
        seconds_per_iteration=speed,
        max_memory_mib=history.largest("max_mem_mb") or log.max_memory_mib,
        notes=(*history.notes, *notes),
    )


def _read_config(folder: Path, notes: list[str]) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    if not path.is_file():
        notes.append(f"{CONFIG_FILE} is not there: its settings are unknown")
        return {}
    try:
        return dict(flatten(load_yaml(str(path))))
    except ConfigError as error:
        notes.append(f"{CONFIG_FILE} cannot be read: {'; '.join(str(error).splitlines())}")
        return {}


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError:
        notes.append(f"{path.name} cannot be read")
        return {}


def _engine(folder: Path, settings: Mapping[str, Any]) -> str:
    if any(key.startswith("D2GO_DATA.") for key in settings):
        return "d2go"
    if (folder / PLAN_FILE).exists() or any(key.startswith("D2SCALE.") for key in settings):
        return "d2scale"
    return "detectron2" if settings else "unknown"


def _world_size(
    folder: Path,
    engine: str,
    settings: Mapping[str, Any],
    plan: Mapping[str, Any],
    log: LogFacts,
) -> int | None:
    known = whole_number(plan.get("world_size")) or log.world_size
    if known:
        return known
    ranks = [path.name.rpartition("rank")[2] for path in folder.glob("log.txt.rank*")]
    if numbers := [int(rank) for rank in ranks if rank.isdigit()]:
        return max(numbers) + 1
    if engine == "d2go":
        return whole_number(settings.get("SOLVER.REFERENCE_WORLD_SIZE"))
    return None


def _evaluated(folder: Path) -> str:
    """Return the dataset that d2go evaluated at the end: a part of one has a name of its own."""
    found = sorted(path.name for path in folder.glob("inference/default/final/*/"))
    return found[0] if len(found) == 1 else ""


def _first_test_set(settings: Mapping[str, Any]) -> str:
    names = settings.get("DATASETS.TEST") or ()
    return str(names[0]) if isinstance(names, (list, tuple)) and names else ""


def _results(
    history: History, log: LogFacts, notes: list[str]
) -> tuple[dict[str, float], dict[str, float], str]:
    """Return the results of the last evaluation, and its dataset where its line names it.

    d2go tells the very last evaluation in the log alone.
    """
    told = [row for row in history.rows if any(_RESULT.match(name) for name in row.values)]
    if told and told[-1] is history.rows[-1]:
        return _results_of(told[-1], notes)
    if log.results:
        return log.results, log.class_results, ""
    if told:
        notes.append(
            f"the results are those of iteration {told[-1].iteration + 1}: "
            "the end of the training has no evaluation"
        )
        return _results_of(told[-1], notes)
    return {}, {}, ""


def _results_of(row: Row, notes: list[str]) -> tuple[dict[str, float], dict[str, float], str]:
    found: dict[str, dict[str, float]] = {}
    for name, value in row.values.items():
        if match := _RESULT.match(name):
            found.setdefault(match["prefix"] or "", {})[match["metric"]] = value
    prefix, values = next(iter(found.items()))
    if len(found) > 1:
        notes.append(f"of several test sets the results are those of {prefix}")
    overall = {name: values[name] for name in METRICS if name in values}
    by_class = {n.removeprefix("AP-"): v for n, v in values.items() if n.startswith("AP-")}
    # d2go's prefix is default/NAME, that of several test sets NAME.
    return overall, by_class, prefix.rpartition("/")[2]


def _seconds_per_iteration(history: History) -> float | None:
    _, seconds = history.curve("time")
    return float(seconds.mean()) if len(seconds) else None


def _total_seconds(history: History) -> float | None:
    """Return the seconds until the last step: the evaluation after it is not training."""
    told = [row.seconds for row in history.rows if "total_loss" in row.values]
    return told[-1] if told and math.isfinite(told[-1]) else None
