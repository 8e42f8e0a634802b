"""A plan as a table, as JSON and as a config that plain detectron2 or d2go can run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import yaml
from tabulate import tabulate

from d2scale.config.upstream import is_plain_detectron2
from d2scale.planning.plan import Plan

# What d2go adds to detectron2's config and a plan may change.
_D2GO_ONLY_SECTIONS = ("QUANTIZATION.", "MODEL_EMA.")


def to_table(plan: Plan) -> str:
    """Return the plan for a reader: the facts, then d2go's table of changed keys."""
    memory = "unknown" if plan.predicted_peak_gib is None else f"{plan.predicted_peak_gib:.2f} GiB"
    facts = [
        ("method", plan.method),
        ("GPUs", plan.world_size),
        ("images per GPU", plan.ims_per_gpu),
        ("accumulation steps", plan.accumulation_steps),
        ("total batch", plan.ims_per_batch),
        ("batch ratio", f"{plan.batch_ratio:g}"),
        ("learning-rate rule", plan.lr_rule),
        ("predicted peak memory", memory),
    ]
    lines = [f"{name + ':':23}{value}" for name, value in facts]
    lines += [f"note: {note}" for note in plan.notes]
    rows = [(key, _show(old), _show(new)) for key, (old, new) in plan.changes.items()]
    table = tabulate(
        rows,
        headers=["config key", "old value", "new value"],
        tablefmt="pipe",
        disable_numparse=True,
    )
    return "\n".join([*lines, "", table if rows else "No key changes."])


def _show(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_json(plan: Plan) -> str:
    """Return the plan as JSON text."""
    return json.dumps(plan.to_json(), indent=2)


def to_yaml(plan: Plan, recipe_path: str, settings: Mapping[str, Any], folder: str) -> str:
    """Return a config that inherits from the recipe and sets the planned values.

    It needs no d2scale to run. detectron2 refuses keys that only d2go has, so with a recipe
    that plain detectron2 can read, those that have no effect there become comments.

    Args:
        plan: the plan.
        recipe_path: the recipe's file.
        settings: what the recipe itself sets, by dotted key.
        folder: where the config will stand; ``_BASE_`` is relative to it.
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
    target[last] = list(value) if isinstance(value, tuple) else value
