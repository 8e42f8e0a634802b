"""The memory profiles that come with d2scale. Needs no torch."""

from __future__ import annotations

import importlib.resources
from functools import cache

from d2scale.memory.profile import MemoryProfile, load_profiles


@cache
def shipped_profiles() -> tuple[MemoryProfile, ...]:
    """Return them all: published recipes, each with its precisions and checkpointing."""
    folder = importlib.resources.files("d2scale.memory") / "profiles"
    if not folder.is_dir():
        return ()
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return tuple(profile for name in names for profile in load_profiles(str(folder.joinpath(name))))
