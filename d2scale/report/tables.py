"""The tables of a report: settings, results, time and memory, the plan."""

from __future__ import annotations

from collections.abc import Sequence

from d2scale.report.columns import METRICS, NOTHING, show_duration, show_metric, show_number
from d2scale.report.document import Cell, Table
from d2scale.report.runs import Run

_MIB_PER_GIB = 1024


def settings_table(runs: Sequence[Run]) -> Table:
    """Return how the runs were trained, one column a run."""
    rows: list[tuple[str, list[str]]] = [
        ("engine", [run.engine for run in runs]),
        ("GPUs or processes", [show_number(run.world_size) for run in runs]),
        ("images per GPU", [_images_per_gpu(run) for run in runs]),
        ("accumulation steps", [show_number(run.plan.get("accumulation_steps")) for run in runs]),
        ("total batch", [show_number(run.ims_per_batch) for run in runs]),
        ("method", [show_number(run.plan.get("method")) for run in runs]),
    ]
    for title, key in (
        ("learning rate", "SOLVER.BASE_LR"),
        ("iterations", "SOLVER.MAX_ITER"),
        ("steps", "SOLVER.STEPS"),
        ("warm-up iterations", "SOLVER.WARMUP_ITERS"),
        ("training set", "DATASETS.TRAIN"),
        ("test set", "DATASETS.TEST"),
        ("weights", "MODEL.WEIGHTS"),
    ):
        rows.append((title, [show_number(run.settings.get(key)) or "random" for run in runs]))
    rows.append(("images seen", [show_number(_images_seen(run), 12) for run in runs]))
    rows.append(("machine", [_machine(run) for run in runs]))
    return by_run("Settings", rows, runs)


def by_run(title: str, rows: Sequence[tuple[str, Sequence[str]]], runs: Sequence[Run]) -> Table:
    """Return a table with one column a run, without rows that tell nothing."""
    return Table(
        title,
        ("", *(run.name for run in runs)),
        tuple(
            (Cell(name), *map(Cell, values))
            for name, values in rows
            if any(value != NOTHING for value in values)
        ),
    )


def _images_per_gpu(run: Run) -> str:
    planned = run.plan.get("ims_per_gpu")
    if planned is not None or not run.ims_per_batch or not run.world_size:
        return show_number(planned)
    return show_number(run.ims_per_batch / run.world_size)


def _images_seen(run: Run) -> float | int | None:
    if run.engine != "published":
        return run.images_seen
    return int(run.ims_per_batch or 0) * int(run.settings["SOLVER.MAX_ITER"])


def _machine(run: Run) -> str:
    return show_number(run.machine.get("description"))


def results_table(runs: Sequence[Run]) -> Table:
    """Return the published columns, one row a run."""
    return Table(
        "Results",
        ("", *METRICS),
        tuple(
            (Cell(run.name), *(Cell(show_metric(run.results.get(name))) for name in METRICS))
            for run in runs
        ),
        notes=("Percent, by the official COCO metric.",),
    )


def class_table(runs: Sequence[Run]) -> Table:
    """Return AP of each class, one column a run."""
    names = tuple(dict.fromkeys(name for run in runs for name in run.class_results))
    return Table(
        "AP of each class",
        ("", *(run.name for run in runs)),
        tuple(
            (Cell(name), *(Cell(show_metric(run.class_results.get(name))) for run in runs))
            for name in names
        ),
        folded=True,
        in_markdown=False,
    )


def throughput_table(runs: Sequence[Run]) -> Table:
    """Return speed and memory, one column a run."""
    first = runs[0].total_seconds
    rows = [
        ("total time", [show_duration(run.total_seconds) for run in runs]),
        ("time saved against the first", [_saved(run, first) for run in runs]),
        ("seconds an iteration", [show_number(run.seconds_per_iteration) for run in runs]),
        ("images a second", [show_number(run.images_per_second) for run in runs]),
        ("GPU memory allocated, at most", [_gib(run.max_memory_mib) for run in runs]),
    ]
    return by_run("Time and memory", rows, runs)


def _saved(run: Run, first: float | None) -> str:
    if not first or run.total_seconds is None:
        return NOTHING
    return f"{1 - run.total_seconds / first:.1%}"


def _gib(mebibytes: float | None) -> str:
    return NOTHING if mebibytes is None else f"{mebibytes / _MIB_PER_GIB:.2f} GiB"
