"""The memory profiles that come with the installed projects."""

from __future__ import annotations

import importlib.resources
from functools import cache
from importlib.metadata import entry_points

from d2scale.planning.memory_profile import MemoryProfile, load_profiles


@cache
def shipped_profiles() -> tuple[MemoryProfile, ...]:
    """Return the memory profiles of all projects, from entry points ``d2scale.memory_profiles``."""
    found: list[MemoryProfile] = []
    for entry in entry_points(group="d2scale.memory_profiles"):
        folder = importlib.resources.files(entry.value)
        for name in sorted(file.name for file in folder.iterdir() if file.name.endswith(".json")):
            found += load_profiles(str(folder.joinpath(name)))
    return tuple(found)
