"""Print plans, profiles and advice as tables, and write a plan as a config for other engines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import yaml
from tabulate import tabulate

from d2scale.config.keys import as_json
from d2scale.config.upstream import is_plain_detectron2
from d2scale.errors import printable
from d2scale.planning.advice import Advice, Row
from d2scale.planning.memory_profile import GIB, MemoryProfile
from d2scale.planning.plan import Plan

# What d2go adds to detectron2's config and a plan may change.
_D2GO_ONLY_SECTIONS = ("QUANTIZATION.", "MODEL_EMA.")
# Device memory in GiB that many GPUs have.
_USUAL_GIB = (8, 11, 16, 24, 40, 80)


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table in Markdown; the entries of a list are joined, None is an empty cell."""
    cells = [[_cell(value) for value in row] for row in rows]
    return tabulate(cells, headers=headers, tablefmt="pipe", disable_numparse=True)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return printable(text)


def plan_table(plan: Plan) -> str:
    """Return the facts of a plan, and d2go's table of the keys that it changes."""
    memory = "unknown" if plan.predicted_peak_gib is None else f"{plan.predicted_peak_gib:.2f} GiB"
    facts = [
        ("method", plan.method),
        ("GPUs", plan.world_size),
        ("images per GPU", plan.ims_per_gpu),
        ("accumulation steps", plan.accumulation_steps),
        *([("virtual ranks", plan.virtual_ranks)] if plan.virtual_ranks else []),
        ("total batch", plan.ims_per_batch),
        ("batch ratio", f"{plan.batch_ratio:g}"),
        ("learning-rate rule", plan.lr_rule),
        ("optimizer steps", _steps(plan)),
        ("predicted peak memory", memory),
    ]
    lines = [f"{name + ':':23}{value}" for name, value in facts]
    lines += [f"note: {note}" for note in plan.notes]
    rows = [(key, old, new) for key, (old, new) in plan.changes.items()]
    changes = table(["config key", "old value", "new value"], rows) if rows else "No key changes."
    return "\n".join([*lines, "", changes])


def _steps(plan: Plan) -> str:
    least, most = plan.steps
    if least == most:
        return str(least)
    expected = f", about {plan.expected_steps} expected" if plan.expected_steps else ""
    return f"{least} to {most}{expected}"


def plan_yaml(plan: Plan, recipe_path: str, settings: Mapping[str, Any], folder: str) -> str:
    """Return a config that inherits from the recipe and sets the planned values.

    It needs no d2scale to run. detectron2 refuses keys that only d2go has, so with a recipe
    that plain detectron2 can read, those that have no effect there become comments. ``settings``
    are those of the recipe itself; ``folder`` is where the config will stand.
    """
    comments = [f"{plan.method} on {plan.world_size} GPUs, planned by d2scale", *plan.notes]
    if plan.accumulation_steps > 1:
        comments.append(
            f"d2scale runs a step in {plan.accumulation_steps} micro-batches of at most "
            f"{plan.ims_per_gpu} images per GPU; engines without it hold the whole step at once"
        )
    keep_all = not is_plain_detectron2(settings)
    nested: dict[str, Any] = {"_BASE_": os.path.relpath(recipe_path, folder)}
    for key, (_, value) in plan.changes.items():
        if keep_all or not key.startswith(_D2GO_ONLY_SECTIONS):
            _nest(nested, key, value)
        else:
            comments.append(f"in d2go also, without effect here: {key}: {value}")
    head = "".join(f"# {comment}\n" for comment in comments)
    return head + yaml.safe_dump(nested, sort_keys=False, default_flow_style=None)


def _nest(target: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for part in parents:
        target = target.setdefault(part, {})
    target[last] = as_json(value)


def profiles_table(profiles: Sequence[MemoryProfile], fraction: float) -> str:
    """Return the points of each profile, and the images per GPU that usual GPUs can hold.

    ``fraction`` is the part of a device's memory that a prediction may fill.
    """
    parts = []
    for profile in profiles:
        parts += [f"{profile.source}: {profile.description}", _points(profile)]
        part = profile.part_to_fill(fraction)
        fits = [(f"{gib} GiB", profile.largest_ims_per_gpu(gib * part * GIB)) for gib in _USUAL_GIB]
        header = f"images per GPU in {part:g} of the memory"
        parts.append(tabulate(fits, headers=["GPU", header], tablefmt="pipe"))
    return "\n\n".join(parts)


def _points(profile: MemoryProfile) -> str:
    rows = []
    for point in profile.points:
        counted = (point.live_bytes, point.reserved_bytes, point.needed_bytes)
        sizes = map(_gib, (*counted, profile.peak_bytes(point.ims_per_gpu)))
        rows.append((point.ims_per_gpu, *sizes))
    headers = ["images per GPU", "live GiB", "reserved GiB", "needed GiB"]
    return table([*headers, f"with {_gib(profile.context_bytes)} GiB for the runtime"], rows)


def _gib(nbytes: int | None) -> str | None:
    return None if nbytes is None else f"{nbytes / GIB:.2f}"


def advice_table(advice: Advice) -> str:
    """Return the batches of an advice as a table, the best one, why it is best, and the notes."""
    headers = ["images per GPU", "GPUs", "total batch", "setting", "images/s", "efficiency"]
    headers += ["images needed", "steps", "time", ""]
    rows = [(*_cells_of(row), "best" if row is advice.best else None) for row in advice.rows]
    best = advice.best.candidate
    facts = [f"{best.ims_per_gpu} per GPU"] if best.ims_per_gpu else []
    facts += [f"GPUs: {best.world_size}"] if best.world_size else []
    where = ", ".join([*facts, best.setting])
    notes = [f"note: {note}" for note in advice.notes]
    lines = [table(headers, rows), "", f"best: {best.ims_per_batch} images a step ({where})"]
    return "\n".join([*lines, f"why: {advice.reason}", *notes])


def _cells_of(row: Row) -> Iterator[Any]:
    batch = row.candidate
    yield from (batch.ims_per_gpu, batch.world_size, batch.ims_per_batch, batch.setting)
    speed = batch.images_per_second
    yield "not measured" if speed is None else f"{speed:.4g}"
    yield from (f"{row.efficiency:.2f}", row.images, row.steps)
    yield "not measured" if row.seconds is None else str(timedelta(seconds=round(row.seconds)))
