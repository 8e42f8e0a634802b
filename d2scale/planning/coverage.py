"""Compare the settings that a memory profile was made with and those of a recipe."""

from __future__ import annotations

import importlib.resources
import re
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import product
from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.class_count import class_count_key
from d2scale.config.defaults import add_project_configs, get_cfg
from d2scale.config.keys import as_json, differences
from d2scale.config.loading import flatten
from d2scale.config.projects import entry_points
from d2scale.config.safe_yaml import UnreadValue
from d2scale.errors import ConfigError, Fault
from d2scale.planning.memory_profile import MemoryProfile, load_profiles

PRECISION = "precision"
ENGINE = "engine"
DEFAULT_ENGINE = "d2scale"
CHECKPOINTING = "D2SCALE.ACTIVATION_CHECKPOINTING"

# Keys of MODEL that say nothing about memory, whatever the model. Projects name their own.
_WITHOUT_MEMORY = re.compile(
    r"WEIGHTS$|DEVICE$|PIXEL_|_TEST|_TH$|THRESH|PROB|ALPHA|GAMMA|LOSS_TYPE|UNUSED_PARAMETERS"
)
# The lower-case ones are a LazyConfig's.
_SECTIONS = ("MODEL.", "model.", "dataloader.train.mapper.")
_OTHER_KEYS = ("INPUT.MAX_SIZE_TRAIN", "DATALOADER.ASPECT_RATIO_GROUPING", CHECKPOINTING)


def coverage(
    cfg: Any, settings: Mapping[str, Any] | None = None, engine: str | None = DEFAULT_ENGINE
) -> dict[str, Any]:
    """Return the settings that memory depends on, by key, as JSON values.

    ``INPUT.MIN_SIZE_TRAIN`` is the largest size, ``precision`` what ``SOLVER.AMP`` makes of the
    activations. A value that was not read is an UnreadValue: it stands for any.

    Args:
        cfg: a config with d2scale's keys.
        settings: what the recipe sets that ``cfg`` may not know, by dotted key. What both leave
            out has the default of the package that reads it.
        engine: what trains it; models of the same name differ from engine to engine. None: any.
    """
    defaults = get_cfg()
    without_memory = add_project_configs(defaults)
    # As the config library reads a word of the command line.
    given = {key: CfgNode._decode_cfg_value(value) for key, value in (settings or {}).items()}
    values = {**dict(flatten(defaults)), **given, **dict(flatten(cfg))}
    covers = {
        key: as_json(value)
        for key, value in sorted(values.items())
        if key.startswith(_SECTIONS)
        and not _WITHOUT_MEMORY.search(key)
        and not f"{key}.".startswith(tuple(f"{name}." for name in without_memory))
    }
    covers["INPUT.MIN_SIZE_TRAIN"] = max(values["INPUT.MIN_SIZE_TRAIN"])
    covers |= {key: as_json(values[key]) for key in _OTHER_KEYS}
    covers["SOLVER.OPTIMIZER"] = str(values["SOLVER.OPTIMIZER"]).lower().removesuffix("_mt")
    covers[ENGINE] = UnreadValue() if engine is None else engine
    covers[PRECISION] = "16 bit" if values["SOLVER.AMP.ENABLED"] else "32 bit"
    unread = {key: value for key, value in given.items() if isinstance(value, UnreadValue)}
    classes = class_count_key(values)
    if classes is not None and values.get(classes) == 0:  # as many as a dataset that is not here
        unread[classes] = UnreadValue()
    return {key: unread.get(key, value) for key, value in covers.items()}


def variant(covers: Mapping[str, Any], *, amp: bool, checkpointing: bool) -> dict[str, Any]:
    """Return the settings with this precision and activation checkpointing."""
    return {**covers, PRECISION: "16 bit" if amp else "32 bit", CHECKPOINTING: checkpointing}


def name_of_variant(covers: Mapping[str, Any]) -> str:
    """Return the precision, and activation checkpointing if it is on, in words."""
    name = "AMP" if covers.get(PRECISION) == "16 bit" else "float32"
    return f"{name}, activation checkpointing" if covers.get(CHECKPOINTING) else name


@cache
def shipped_profiles() -> tuple[MemoryProfile, ...]:
    """Return the profiles that the installed projects bring with them.

    The entry points ``d2scale.memory_profiles`` name packages that hold JSON files of profiles.
    """
    profiles: list[MemoryProfile] = []
    for entry in entry_points(group="d2scale.memory_profiles"):
        files = importlib.resources.files(entry.value).iterdir()
        for path in sorted(str(file) for file in files if file.name.endswith(".json")):
            profiles += load_profiles(path)
    return tuple(profiles)


def find_profile(
    profiles: Sequence[MemoryProfile], covers: Mapping[str, Any]
) -> MemoryProfile | None:
    """Return the profile that holds for ``covers``, or None. One that names nothing holds."""
    return next((profile for profile in profiles if not _differences(profile, covers)), None)


def find_variants(
    profiles: Sequence[MemoryProfile], profile: MemoryProfile | None
) -> tuple[MemoryProfile, ...]:
    """Return the profiles of other precisions and of activation checkpointing, and ``profile``."""
    if profile is None or not profile.covers:
        return ()
    choices = product((False, True), repeat=2)
    wanted = (variant(profile.covers, amp=a, checkpointing=c) for a, c in choices)
    known = (find_profile(profiles, covers) for covers in wanted)
    return tuple(other for other in known if other is not None)


def choose_profile(
    profiles: Sequence[MemoryProfile], covers: Mapping[str, Any], where: str
) -> MemoryProfile:
    """Return the profile that holds for ``covers``; ``where`` names their file in faults.

    Raises:
        ConfigError: if none does; one line for each setting in which the nearest differs.
    """
    profile = find_profile(profiles, covers)
    if profile is not None:
        return profile
    nearest = min((_differences(profile, covers) for profile in profiles), key=len)
    made_for = f"for which the memory profile {where} was made"
    advice = "make one for this recipe with d2scale memory, or correct the key"
    raise ConfigError(
        [
            Fault(key, asked, f"{made!r}, {made_for}", advice)
            for key, (made, asked) in nearest.items()
        ]
    )


def _differences(profile: MemoryProfile, covers: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what the profile was made with and what is asked for, by key, where they differ."""
    asked = {key: covers.get(key) for key in profile.covers}
    read = {key: value for key, value in asked.items() if not isinstance(value, UnreadValue)}
    return differences(profile.covers, read)
