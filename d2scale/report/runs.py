"""One training, read from a run folder of d2scale, detectron2 or d2go."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from d2scale.coco.accumulate import METRICS
from d2scale.config import own_datasets
from d2scale.config.loading import flatten, load_yaml
from d2scale.errors import ConfigError
from d2scale.planning.gain import range_of_steps
from d2scale.report.history import History, Row, read_history
from d2scale.report.log_file import LogFacts, read_log
from d2scale.run_folder.contents import read_json
from d2scale.run_folder.files import (
    CONFIG_FILE,
    INFERENCE_FOLDER,
    LOG_FILE,
    MACHINE_FILE,
    PLAN_FILE,
)

_RESULT = re.compile(r"^(?:(?P<prefix>.+)/)?bbox/(?P<metric>[^/].*)$")
# Of detectron2's and d2go's metric, which do not follow TEST.DETECTIONS_PER_IMAGE.
_OFFICIAL_MAX_DETS = 100


@dataclass(frozen=True)
class Run:
    """One training; what is not known is None or empty."""

    name: str  # for tables and legends
    folder: Path | None
    engine: str  # d2scale, d2go, detectron2, published or unknown
    settings: Mapping[str, Any] = field(default_factory=dict)  # as it was run, by dotted key
    world_size: int | None = None
    plan: Mapping[str, Any] = field(default_factory=dict)  # plan.json
    machine: Mapping[str, Any] = field(default_factory=dict)  # machine.json
    history: History = field(default_factory=History)
    test_set: str = ""  # the dataset that the results are on
    results: Mapping[str, float] = field(default_factory=dict)  # percent, by published column
    class_results: Mapping[str, float] = field(default_factory=dict)  # AP of each class, percent
    total_seconds: float | None = None  # with the evaluations in between, without the last
    seconds_per_step: float | None = None  # mean
    max_memory_mib: float | None = None  # largest memory allocated on a GPU
    notes: tuple[str, ...] = ()  # what is missing or had to be computed

    @property
    def ims_per_batch(self) -> int | None:
        """Total batch."""
        return _whole_number(self.settings.get("SOLVER.IMS_PER_BATCH"))

    @property
    def max_dets(self) -> int:
        """Best detections of an image that count in the metric."""
        limit = _whole_number(self.settings.get("TEST.DETECTIONS_PER_IMAGE"))
        return limit if limit and self.engine == "d2scale" else _OFFICIAL_MAX_DETS

    @property
    def follows_gain(self) -> bool:
        """Whether steps counted for what they were worth, so that iterations are the recipe's."""
        return self.settings.get("D2SCALE.LR_RULE") == "gain"

    @property
    def recipe_ims_per_batch(self) -> int | None:
        """Total batch of the steps that the iterations count."""
        of_recipe = _whole_number(self.settings.get("D2SCALE.RECIPE_IMS_PER_BATCH"))
        return of_recipe if self.follows_gain and of_recipe else self.ims_per_batch

    @property
    def planned_steps(self) -> tuple[int, int] | None:
        """Fewest and most optimizer steps of the whole training."""
        max_iter = _whole_number(self.settings.get("SOLVER.MAX_ITER"))
        if not max_iter or not self.ims_per_batch or not self.recipe_ims_per_batch:
            return (max_iter, max_iter) if max_iter else None
        return range_of_steps(max_iter, self.ims_per_batch, self.recipe_ims_per_batch)

    @property
    def planned_images(self) -> tuple[int, int] | None:
        """Fewest and most images of the whole training."""
        if not self.planned_steps or not self.ims_per_batch:
            return None
        least, most = self.planned_steps
        return least * self.ims_per_batch, most * self.ims_per_batch

    @property
    def steps(self) -> float | None:
        """Optimizer steps since the training began."""
        return self.history.rows[-1].steps if self.history.rows else None

    @property
    def images_seen(self) -> float | None:
        """Images since the training began; of a published run by its settings."""
        if self.engine == "published":
            return self.planned_images[0] if self.planned_images else None
        images = self.history.rows[-1].images_seen if self.history.rows else math.nan
        return images if math.isfinite(images) else None

    @property
    def recipe_images(self) -> float | None:
        """Images of the recipe's training that the steps were worth: but for gain those seen."""
        recipe_steps = self.history.last("recipe_steps")
        if not self.follows_gain or recipe_steps is None or not self.recipe_ims_per_batch:
            return self.images_seen
        return recipe_steps * self.recipe_ims_per_batch

    @property
    def efficiency(self) -> float | None:
        """Progress of an image over that in the recipe's batch, by the gain rule's measurements."""
        if not self.follows_gain or not self.images_seen or not self.recipe_images:
            return None
        return self.recipe_images / self.images_seen

    @property
    def images_per_second(self) -> float | None:
        """Images of the total batch by the mean seconds of a step."""
        images, seconds = self.ims_per_batch, self.seconds_per_step
        return images / seconds if images and seconds else None


def _whole_number(value: Any) -> int | None:
    """Return a positive whole number, None for anything else."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder: ``metrics.json`` or TensorBoard events, ``log.txt``, ``config.yaml``, ...

    A file that is broken or missing ends up in ``notes``, not in an error.
    """
    notes: list[str] = []
    log = read_log(folder)
    settings = _read_config(folder, notes)
    engine = _engine(folder, settings)
    if engine == "d2go":
        # d2go writes the config as it was before scaling.
        settings.update(log.scaled)
    plan = _read_json(folder / PLAN_FILE, notes)
    history = read_history(folder, _whole_number(settings.get("SOLVER.IMS_PER_BATCH")))
    results, class_results, dataset = _results(history, log, notes)
    return Run(
        name=name,
        folder=folder,
        engine=engine,
        settings=settings,
        world_size=(
            _whole_number(plan.get("world_size"))
            or log.world_size
            or _ranks_with_logs(folder)
            or _whole_number(engine == "d2go" and settings.get("SOLVER.REFERENCE_WORLD_SIZE"))
        ),
        plan=plan,
        machine=_read_json(folder / MACHINE_FILE, notes),
        history=history,
        test_set=dataset or _d2go_test_set(folder) or _first_test_set(settings),
        results=results,
        class_results=class_results,
        total_seconds=log.total_seconds or _total_seconds(history),
        seconds_per_step=_seconds_per_step(history, log),
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


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        return read_json(path)
    except ConfigError:
        notes.append(f"{path.name} cannot be read")
        return {}


def _engine(folder: Path, settings: Mapping[str, Any]) -> str:
    if any(key.startswith("D2GO_DATA.") and key not in own_datasets.KEYS for key in settings):
        return "d2go"
    if (folder / PLAN_FILE).exists() or any(key.startswith("D2SCALE.") for key in settings):
        return "d2scale"
    return "detectron2" if settings else "unknown"


def _ranks_with_logs(folder: Path) -> int | None:
    ranks = [path.name.rpartition("rank")[2] for path in folder.glob(f"{LOG_FILE}.rank*")]
    numbers = [int(rank) for rank in ranks if rank.isdigit()]
    return max(numbers) + 1 if numbers else None


def _d2go_test_set(folder: Path) -> str:
    """Return the dataset that d2go evaluated at the end: a part of one has a name of its own."""
    names = [path.name for path in folder.glob(f"{INFERENCE_FOLDER}/default/final/*/")]
    return names[0] if len(names) == 1 else ""


def _first_test_set(settings: Mapping[str, Any]) -> str:
    names = settings.get("DATASETS.TEST")
    return str(names[0]) if isinstance(names, (list, tuple)) and names else ""


def _results(
    history: History, log: LogFacts, notes: list[str]
) -> tuple[dict[str, float], dict[str, float], str]:
    """Return overall and class results of the last evaluation, and its dataset if it is named."""
    rows = [row for row in history.rows if any(map(_RESULT.match, row.values))]
    at_end = bool(rows) and rows[-1] is history.rows[-1]
    # d2go writes the very last evaluation to the log alone.
    if log.results and not at_end:
        return log.results, log.class_results, ""
    if not rows:
        return {}, {}, ""
    if not at_end:
        notes.append(
            f"the results are those of iteration {rows[-1].iteration + 1}: "
            "the end of the training has no evaluation"
        )
    return _results_of(rows[-1], notes)


def _results_of(row: Row, notes: list[str]) -> tuple[dict[str, float], dict[str, float], str]:
    by_prefix: dict[str, dict[str, float]] = {}
    for name, value in row.values.items():
        if match := _RESULT.match(name):
            by_prefix.setdefault(match["prefix"] or "", {})[match["metric"]] = value
    prefix, values = next(iter(by_prefix.items()))
    if len(by_prefix) > 1:
        notes.append(f"of several test sets the results are those of {prefix}")
    overall = {name: values[name] for name in METRICS if name in values}
    by_class = {n.removeprefix("AP-"): v for n, v in values.items() if n.startswith("AP-")}
    # d2go's prefix is default/NAME, that of several test sets NAME.
    return overall, by_class, prefix.rpartition("/")[2]


def _seconds_per_step(history: History, log: LogFacts) -> float | None:
    # The log divides by iterations, which by the gain rule are not the steps taken.
    by_gain = history.last("gain") is not None
    return (None if by_gain else log.seconds_per_iteration) or history.mean("time")


def _total_seconds(history: History) -> float | None:
    """Return the seconds until the last step: the evaluation after it is not training."""
    seconds = [row.seconds for row in history.rows if "total_loss" in row.values]
    return seconds[-1] if seconds and math.isfinite(seconds[-1]) else None
