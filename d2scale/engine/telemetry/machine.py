"""Describe the machine of a run, for comparing it with other runs."""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from d2scale import __version__
from d2scale.step.precision import tf32_use
from d2scale.step.ranks import largest_over_ranks, world_size

_CPU_FACTS = Path("/proc/cpuinfo")


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return what ``machine.json`` holds. Every rank must call it, with its own device.

    ``device`` is named as on the first rank. Only with CUDA there are ``device_memory_mb``, of the
    smallest of all ranks' devices, and ``tf32``, what is computed in TF32 in the place of float32.
    """
    cpu = cpu_name()
    cores = os.cpu_count() or 1
    facts: dict[str, Any] = {
        "description": f"{cpu}, {cores} cores, no GPU used",
        "device": "cpu",
        "cpu": cpu,
        "cpu_cores": cores,
        "processes": world_size(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "d2scale": __version__,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        # The largest of the negative is the smallest.
        total = -largest_over_ranks({"bytes": -float(properties.total_memory)})["bytes"]
        facts["device"] = properties.name
        facts["device_memory_mb"] = total / 2**20
        facts["tf32"] = tf32_use(properties.major)
        facts["description"] = f"{world_size()} x {properties.name}, {total / 2**30:.1f} GiB each"
    return facts


def cpu_name() -> str:
    """Return the name of the processor."""
    lines: list[str] = []
    with suppress(OSError):
        lines = _CPU_FACTS.read_text(encoding="utf-8", errors="replace").splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
