"""Which machine a benchmark ran on, and where its results are kept."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

from d2scale.engine.telemetry.machine import cpu_name
from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import write_atomically
from d2scale.step.precision import tf32_use

RESULTS = Path(__file__).parent / "results"


def describe() -> dict[str, Any]:
    """Return what decides a result: processor, cores, GPUs, versions, date."""
    return {
        "processor": cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "gpus": [
            f"{p.name}, {p.total_memory / 2**30:.1f} GiB, TF32 for {tf32_use(p.major)}"
            for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        "python": platform.python_version(),
        "packages": {
            name: found
            for name in ("torch", "torchvision", "detectron2", "d2scale", "lightning", "accelerate")
            if (found := _version(name))
        },
        "date": time.strftime("%Y-%m-%d"),
    }


def table_of(rows: list[dict[str, Any]], hidden: Sequence[str] = ("key", "machine")) -> str:
    """Return ``rows`` as a table, without the columns ``hidden``; empty without rows."""
    shown = [{name: value for name, value in r.items() if name not in hidden} for r in rows]
    return tabulate(shown, headers="keys", tablefmt="pipe")


def kept(name: str, key: str) -> list[dict[str, Any]]:
    """Return the rows of ``results/NAME.json``, none without it; ConfigError if it is damaged."""
    path = RESULTS / f"{name}.json"
    if not path.exists():
        return []
    try:
        rows = json.loads(path.read_text())
        if not all(key in row and "gpus" in row["machine"] for row in rows):
            raise ValueError("a row without what every row has")
    except (ValueError, TypeError, KeyError) as error:
        advice = f"mend it or remove it: {error}"
        raise ConfigError([Fault("results", str(path), "rows as they were kept", advice)]) from None
    return list(rows)


def keep(name: str, rows: list[dict[str, Any]], key: str) -> list[dict[str, Any]]:
    """Put ``rows`` into ``results/NAME.json``, in place of those with the same ``key``.

    Every row keeps the machine that it was made on.

    Returns:
        All rows of the file.
    """
    path = RESULTS / f"{name}.json"
    known = kept(name, key)
    made = {row[key] for row in rows}
    machine = describe()
    others = [row for row in known if row[key] not in made]
    merged = others + [{**row, "machine": machine} for row in rows]
    RESULTS.mkdir(exist_ok=True)
    # A benchmark may be stopped at any moment.
    write_atomically(path, json.dumps(merged, indent=1) + "\n")
    return merged


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""
