"""The tables of training: settings, time, memory, and the plan against what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from d2scale.report.document import Cell, Section, Table
from d2scale.report.formatting import NOTHING, show_count, show_duration, show_memory, show_number
from d2scale.report.published import Publication
from d2scale.report.runs import Run

# How each row shows a run, by the title of the row.
Rows = Mapping[str, Callable[[Run], str]]

# Of the first run's images, by the gain rule of what they were worth. The published run whose
# schedule was rounded saw 0.94 of them; a run below this has not saved time but trained less.
_SAME_LENGTH = 0.9

_SETTINGS = {
    "learning rate": "SOLVER.BASE_LR",
    "iterations": "SOLVER.MAX_ITER",
    "steps of the learning rate": "SOLVER.STEPS",
    "warm-up iterations": "SOLVER.WARMUP_ITERS",
    "AMP": "SOLVER.AMP.ENABLED",
    "smallest edge in training": "INPUT.MIN_SIZE_TRAIN",
    "training set": "DATASETS.TRAIN",
    "test set": "DATASETS.TEST",
    "weights at the start": "MODEL.WEIGHTS",
}


_ITERATIONS_BY_GAIN = (
    "By the gain rule iterations are those of the recipe: a step counts for as many of them as it "
    "is worth (its gain), at the learning rate above times its gain"
)
_EFFICIENCY = (
    "Efficiency: the images in the recipe's batch over those in this one that train as far, by the "
    "noise that was measured."
)


def settings_section(runs: Sequence[Run], publications: Sequence[Publication]) -> Section:
    """Return how the runs were trained, one column a run."""
    runs = [*runs, *(run for publication in publications for run in publication.runs)]
    rows: Rows = {
        "engine": lambda run: run.engine,
        "GPUs or processes": lambda run: show_number(run.world_size),
        "images per GPU": _images_per_gpu,
        "accumulation steps": lambda run: show_number(run.plan.get("accumulation_steps")),
        "total batch": lambda run: show_number(run.ims_per_batch),
        "scaling method": lambda run: show_number(run.plan.get("method")),
        "learning-rate rule": _lr_rule,
        **{title: partial(_setting, key=key) for title, key in _SETTINGS.items()},
        "images seen": lambda run: show_count(run.images_seen),
        "machine": lambda run: show_number(run.machine.get("description")),
    }
    notes = [
        f"{source.title}: {source.source}. Ran on {source.machine}. {' '.join(source.notes)}"
        for source in publications
    ]
    if by_gain := [run.name for run in runs if run.follows_gain]:
        notes.append(f"{_ITERATIONS_BY_GAIN}: {', '.join(by_gain)}.")
    return Section("Settings", tables=(_by_run("How they were trained", rows, runs, notes),))


def _by_run(title: str, rows: Rows, runs: Sequence[Run], notes: Sequence[str] = ()) -> Table:
    """Return a table with one column a run, without rows that are empty for all runs."""
    values = {name: [show(run) for run in runs] for name, show in rows.items()}
    filled = {name: row for name, row in values.items() if set(row) != {NOTHING}}
    cells = tuple((Cell(name), *map(Cell, row)) for name, row in filled.items())
    return Table(title, ("", *(run.name for run in runs)), cells, tuple(notes), wraps=True)


def _setting(run: Run, key: str) -> str:
    value = run.settings.get(key)
    # All digits: a planned learning rate has many.
    return "none" if value == "" else show_number(value, 12)


def _lr_rule(run: Run) -> str:
    """Return the rule that the config names, or that took effect on another batch."""
    rule = run.settings.get("D2SCALE.LR_RULE", "auto")
    if rule == "auto":
        rescaled = run.plan.get("batch_ratio", 1.0) != 1.0
        rule = run.plan.get("lr_rule") if rescaled else None
    return show_number(rule)


def _images_per_gpu(run: Run) -> str:
    images = run.plan.get("ims_per_gpu")
    if images is None and run.ims_per_batch and run.world_size:
        images = run.ims_per_batch / run.world_size
    return show_number(images)


def throughput_section(runs: Sequence[Run], publications: Sequence[Publication]) -> Section:
    """Return speed and memory, and what was planned against what was measured."""
    groups = [runs, *(publication.runs for publication in publications)]
    saved = {id(run): _saved(run, group[0]) for group in groups for run in group}
    rows: Rows = {
        "total time": lambda run: show_duration(run.total_seconds),
        "time saved against the first": lambda run: saved[id(run)],
        "seconds a step": lambda run: show_number(run.seconds_per_step),
        "images a second": lambda run: show_number(run.images_per_second),
        "GPU memory allocated, fullest GPU": lambda run: show_memory(run.max_memory_mib),
        "GPU memory reserved, fullest GPU": lambda run: show_memory(
            run.history.largest("max_reserved_mb")
        ),
        "GPU memory there is": lambda run: show_memory(_positive(run.machine, "device_memory_mb")),
        "share reserved": _share_reserved,
    }
    notes = ["Total time is that of training with the evaluations in between, not the last one."]
    if not any(run.max_memory_mib for run in runs):
        notes.append("No run reports GPU memory: none of them used a GPU, or recorded it.")
    if first_gpu := [r.name for r in runs if r.max_memory_mib and r.engine != "d2scale"]:
        notes.append(f"Memory of the first GPU, which alone is logged: {', '.join(first_gpu)}.")
    tables = [_by_run("Time and memory", rows, [run for group in groups for run in group], notes)]
    if planned := [run for run in runs if run.plan]:
        notes = [_EFFICIENCY] if any(run.efficiency for run in planned) else []
        tables.append(_by_run("The plan and what was measured", _PLAN_ROWS, planned, notes))
    return Section("Throughput", tables=tuple(tables))


def time_saved(run: Run, first: Run) -> float | None:
    """Return the share of the first run's time that another one saved; negative if it took more.

    None if a time is not known, or the run trained for a smaller part of the images.
    """
    if run is first or not first.total_seconds or run.total_seconds is None:
        return None
    images, first_images = run.recipe_images, first.recipe_images
    if images and first_images and images < _SAME_LENGTH * first_images:
        return None
    return 1 - run.total_seconds / first.total_seconds


def _saved(run: Run, first: Run) -> str:
    saved = time_saved(run, first)
    if saved is not None:
        return f"{saved:.1%}" if saved >= 0 else f"none, {-saved:.1%} more"
    unknown = run is first or run.total_seconds is None or not first.total_seconds
    return NOTHING if unknown else f"{NOTHING} (fewer images seen)"


def _positive(facts: Mapping[str, Any], name: str) -> float | None:
    value = facts.get(name)
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _share_reserved(run: Run) -> str:
    reserved = run.history.largest("max_reserved_mb")
    available = _positive(run.machine, "device_memory_mb")
    return f"{reserved / available:.1%}" if reserved and available else NOTHING


def _images_a_step(run: Run) -> str:
    """Return the images seen from the first report to the last, by the steps between."""
    rows = [row for row in run.history.rows if "total_loss" in row.values]
    if len(rows) < 2 or rows[-1].steps == rows[0].steps:
        return NOTHING
    images = rows[-1].images_seen - rows[0].images_seen
    return show_number(images / (rows[-1].steps - rows[0].steps))


def _span(span: tuple[int, int] | None) -> str:
    """Return ``250``, or ``125 to 250`` if the length is not known beforehand."""
    return NOTHING if span is None else " to ".join(map(show_count, dict.fromkeys(span)))


def _predicted(run: Run) -> str:
    predicted = _positive(run.plan, "predicted_peak_gib")
    return f"{predicted:.2f} GiB" if predicted else "not predicted"


def _prediction_error(run: Run) -> str:
    predicted, allocated = _positive(run.plan, "predicted_peak_gib"), run.max_memory_mib
    return f"{predicted * 1024 / allocated - 1:+.1%}" if predicted and allocated else NOTHING


_PLAN_ROWS: Rows = {
    "images a step, planned": lambda run: show_number(run.plan.get("ims_per_batch")),
    "images a step, measured": _images_a_step,
    "iterations, planned": partial(_setting, key="SOLVER.MAX_ITER"),
    "iterations, done": lambda run: show_count(
        run.history.rows[-1].iteration + 1 if run.history.rows else None
    ),
    "optimizer steps, planned": lambda run: _span(run.planned_steps),
    "optimizer steps, taken": lambda run: show_count(run.steps),
    "images, planned": lambda run: _span(run.planned_images),
    "images, seen": lambda run: show_count(run.images_seen),
    "efficiency against the recipe's batch": lambda run: (
        NOTHING if run.efficiency is None else f"{run.efficiency:.0%}"
    ),
    "peak memory, predicted": _predicted,
    "peak memory, allocated": lambda run: show_memory(run.max_memory_mib),
    "peak memory, predicted to allocated": _prediction_error,
}
