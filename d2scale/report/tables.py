"""The tables of a report that are not about results: settings, time, memory, the plan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2scale.report.columns import NOTHING, show_duration, show_number
from d2scale.report.document import Cell, Section, Table
from d2scale.report.published import Publication
from d2scale.report.runs import Run, whole_number

_MIB_PER_GIB = 1024
# A run that was shown a smaller part of the first one's images has saved no time. The third of
# the published ones, whose schedule was rounded, saw 0.94 of them.
_SAME_LENGTH = 0.9

_SETTINGS = (
    ("learning rate", "SOLVER.BASE_LR"),
    ("iterations", "SOLVER.MAX_ITER"),
    ("steps of the learning rate", "SOLVER.STEPS"),
    ("warm-up iterations", "SOLVER.WARMUP_ITERS"),
    ("AMP", "SOLVER.AMP.ENABLED"),
    ("smallest edge in training", "INPUT.MIN_SIZE_TRAIN"),
    ("training set", "DATASETS.TRAIN"),
    ("test set", "DATASETS.TEST"),
    ("weights at the start", "MODEL.WEIGHTS"),
)


def settings_section(runs: Sequence[Run], publications: Sequence[Publication]) -> Section:
    """Return how the runs were trained, one column a run."""
    runs = [*runs, *(run for each in publications for run in each.runs)]
    rows = [
        ("engine", [run.engine for run in runs]),
        ("GPUs or processes", [show_number(run.world_size) for run in runs]),
        ("images per GPU", [_images_per_gpu(run) for run in runs]),
        ("accumulation steps", [show_number(run.plan.get("accumulation_steps")) for run in runs]),
        ("total batch", [show_number(run.ims_per_batch) for run in runs]),
        ("scaling method", [show_number(run.plan.get("method")) for run in runs]),
        *((title, [_setting(run, key) for run in runs]) for title, key in _SETTINGS),
        ("images seen", [_count(run.images_seen) for run in runs]),
        ("machine", [show_number(run.machine.get("description")) for run in runs]),
    ]
    notes = [
        f"{each.title}: {each.source}. Ran on {each.machine}. {' '.join(each.notes)}"
        for each in publications
    ]
    return Section("Settings", tables=(_by_run("How they were trained", rows, runs, notes),))


def _by_run(
    title: str,
    rows: Sequence[tuple[str, Sequence[str]]],
    runs: Sequence[Run],
    notes: Sequence[str] = (),
) -> Table:
    """Return a table with one column a run, without rows that tell nothing."""
    told = [(name, values) for name, values in rows if any(value != NOTHING for value in values)]
    return Table(
        title,
        ("", *(run.name for run in runs)),
        tuple((Cell(name), *map(Cell, values)) for name, values in told),
        tuple(notes),
        wraps=True,
    )


def _setting(run: Run, key: str) -> str:
    value = run.settings.get(key)
    # All digits: a planned learning rate has many.
    return "none" if value == "" else show_number(value, 12)


def _images_per_gpu(run: Run) -> str:
    planned = run.plan.get("ims_per_gpu")
    if planned is not None or not run.ims_per_batch or not run.world_size:
        return show_number(planned)
    return show_number(run.ims_per_batch / run.world_size)


def _count(value: float | None) -> str:
    return NOTHING if value is None else f"{round(value):,}".replace(",", " ")


def throughput_section(runs: Sequence[Run], publications: Sequence[Publication]) -> Section:
    """Return speed and memory, and what the plan said about them."""
    first = [(run, runs[0]) for run in runs]
    first += [(run, each.runs[0]) for each in publications for run in each.runs]
    shown = [run for run, _ in first]
    rows = [
        ("total time", [show_duration(run.total_seconds) for run in shown]),
        ("time saved against the first", [_saved(*pair) for pair in first]),
        ("seconds an iteration", [show_number(run.seconds_per_iteration) for run in shown]),
        ("images a second", [show_number(run.images_per_second) for run in shown]),
        ("GPU memory allocated, fullest GPU", [_gib(run.max_memory_mib) for run in shown]),
        ("GPU memory reserved, fullest GPU", [_gib(_reserved(run)) for run in shown]),
        ("GPU memory there is", [_gib(_available(run)) for run in shown]),
        ("share reserved", [_share(run) for run in shown]),
    ]
    notes = ["Total time is that of training with the evaluations in between, not the last one."]
    if not any(run.max_memory_mib for run in runs):
        notes.append("No run tells GPU memory: none of them used a GPU, or recorded it.")
    first_gpu = [run.name for run in runs if run.max_memory_mib and run.engine != "d2scale"]
    if first_gpu:
        notes.append(f"Memory of the first GPU, which alone is logged: {', '.join(first_gpu)}.")
    tables = [_by_run("Time and memory", rows, shown, notes)]
    planned = [run for run in runs if run.plan]
    if planned:
        tables.append(_plan_table(planned))
    return Section("Throughput", tables=tuple(tables))


def time_saved(run: Run, first: Run) -> float | None:
    """Return the share of the first run's time that another one saved; negative if it took more.

    None if a time is not known, or the run was shown a smaller part of the images.
    """
    if run is first or not first.total_seconds or run.total_seconds is None:
        return None
    if run.images_seen and first.images_seen and run.images_seen < _SAME_LENGTH * first.images_seen:
        return None
    return 1 - run.total_seconds / first.total_seconds


def _saved(run: Run, first: Run) -> str:
    saved = time_saved(run, first)
    if saved is not None:
        return f"{saved:.1%}" if saved >= 0 else f"none, {-saved:.1%} more"
    if run is first or run.total_seconds is None or not first.total_seconds:
        return NOTHING
    return f"{NOTHING} (fewer images seen)"


def _reserved(run: Run) -> float | None:
    return run.history.largest("max_reserved_mb")


def _available(run: Run) -> float | None:
    value = run.machine.get("device_memory_mb")
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _share(run: Run) -> str:
    reserved, available = _reserved(run), _available(run)
    return f"{reserved / available:.1%}" if reserved and available else NOTHING


def _gib(mebibytes: float | None) -> str:
    return NOTHING if mebibytes is None else f"{mebibytes / _MIB_PER_GIB:.2f} GiB"


def _plan_table(runs: Sequence[Run]) -> Table:
    """Return what was planned and what came of it, one column a run."""
    rows = [
        ("images a step, planned", [show_number(run.plan.get("ims_per_batch")) for run in runs]),
        ("images a step, measured", [_images_a_step(run) for run in runs]),
        ("iterations, planned", [_setting(run, "SOLVER.MAX_ITER") for run in runs]),
        ("iterations, done", [_count(_iterations(run)) for run in runs]),
        ("images, planned", [_count(_planned_images(run)) for run in runs]),
        ("images, seen", [_count(run.images_seen) for run in runs]),
        ("peak memory, predicted", [_predicted(run.plan) for run in runs]),
        ("peak memory, allocated", [_gib(run.max_memory_mib) for run in runs]),
        ("peak memory, predicted to allocated", [_prediction_error(run) for run in runs]),
    ]
    return _by_run("The plan and what came of it", rows, runs)


def _images_a_step(run: Run) -> str:
    """Return the images seen from the first report to the last, by the iterations between."""
    rows = [row for row in run.history.rows if "total_loss" in row.values]
    if len(rows) < 2 or rows[-1].iteration == rows[0].iteration:
        return NOTHING
    images = rows[-1].images_seen - rows[0].images_seen
    return show_number(images / (rows[-1].iteration - rows[0].iteration))


def _iterations(run: Run) -> float | None:
    return run.history.rows[-1].iteration + 1 if run.history.rows else None


def _planned_images(run: Run) -> float | None:
    iterations = whole_number(run.settings.get("SOLVER.MAX_ITER"))
    return iterations * run.ims_per_batch if iterations and run.ims_per_batch else None


def _predicted_gib(plan: Any) -> float | None:
    value = plan.get("predicted_peak_gib")
    return float(value) if isinstance(value, (int, float)) and value > 0 else None


def _predicted(plan: Any) -> str:
    value = _predicted_gib(plan)
    return "not predicted" if value is None else f"{value:.2f} GiB"


def _prediction_error(run: Run) -> str:
    predicted = _predicted_gib(run.plan)
    if predicted is None or not run.max_memory_mib:
        return NOTHING
    return f"{predicted * _MIB_PER_GIB / run.max_memory_mib - 1:+.1%}"
