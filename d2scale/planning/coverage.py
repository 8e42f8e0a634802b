"""Which settings a memory profile holds for. Needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from typing import Any

from fvcore.common.config import CfgNode

from d2scale.config.defaults import get_cfg
from d2scale.config.loading import flatten
from d2scale.errors import ConfigError, Fault
from d2scale.planning.memory_profile import MemoryProfile

PRECISION = "precision"
ENGINE = "engine"
DEFAULT_ENGINE = "d2scale"
CHECKPOINTING = "D2SCALE.ACTIVATION_CHECKPOINTING"

# Keys of MODEL that say nothing about the size of what training holds.
_WITHOUT_BYTES = re.compile(
    r"WEIGHTS$|DEVICE$|PIXEL_|_TEST|_TH$|THRESH|PROB|ALPHA|GAMMA|RADIUS|CENTER_SAMPLE"
    r"|SIZES_OF_INTEREST|LOSS_TYPE|UNUSED_PARAMETERS|META_LEARN|TFA|BACKBONE\.FREEZE$"
)
_OTHER_KEYS = ("INPUT.MAX_SIZE_TRAIN", "DATALOADER.ASPECT_RATIO_GROUPING", CHECKPOINTING)


def coverage(
    cfg: Any, settings: Mapping[str, Any] | None = None, engine: str = DEFAULT_ENGINE
) -> dict[str, Any]:
    """Return the settings that memory depends on.

    Args:
        cfg: a config with d2scale's keys.
        settings: what the recipe sets that ``cfg`` may not know, by dotted key. What both leave
            out has the default of the package that reads it.
        engine: what trains it: each has its own models of the same name.

    Returns:
        By key, JSON values. ``INPUT.MIN_SIZE_TRAIN`` is the largest size, ``precision`` what
        ``SOLVER.AMP`` makes of the activations.
    """
    given = {key: _decoded(value) for key, value in (settings or {}).items()}
    complete = {**_defaults(), **given, **dict(flatten(cfg))}
    found = {
        key: _plain(value)
        for key, value in sorted(complete.items())
        if key.startswith("MODEL.") and not _WITHOUT_BYTES.search(key)
    }
    sizes = complete["INPUT.MIN_SIZE_TRAIN"]
    found["INPUT.MIN_SIZE_TRAIN"] = max(sizes) if isinstance(sizes, Sequence) else sizes
    found |= {key: _plain(complete[key]) for key in _OTHER_KEYS}
    found["SOLVER.OPTIMIZER"] = str(complete["SOLVER.OPTIMIZER"]).lower().removesuffix("_mt")
    found[ENGINE] = engine
    found[PRECISION] = "16 bit" if complete["SOLVER.AMP.ENABLED"] else "32 bit"
    return found


def variant(covers: Mapping[str, Any], *, amp: bool, checkpointing: bool) -> dict[str, Any]:
    """Return the same settings with another precision and activation checkpointing."""
    changed = {PRECISION: "16 bit" if amp else "32 bit", CHECKPOINTING: checkpointing}
    return {**covers, **changed}


def find_profile(
    profiles: Sequence[MemoryProfile], covers: Mapping[str, Any]
) -> MemoryProfile | None:
    """Return the profile that holds for ``covers``, or None. One that names nothing holds."""
    for profile in profiles:
        if not differences(profile, covers):
            return profile
    return None


def differences(profile: MemoryProfile, covers: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what the profile was made with and what is asked for, by key, where they differ."""
    return {
        key: (value, covers.get(key))
        for key, value in profile.covers.items()
        if covers.get(key) != value
    }


def choose_profile(
    profiles: Sequence[MemoryProfile], covers: Mapping[str, Any], where: str
) -> MemoryProfile:
    """Return the profile that holds for ``covers``.

    Raises:
        ConfigError: if none does; one line for each setting in which the nearest differs.
    """
    found = find_profile(profiles, covers)
    if found is not None:
        return found
    nearest = min(profiles, key=lambda profile: len(differences(profile, covers)))
    raise ConfigError(
        [
            Fault(
                key,
                asked,
                f"{made!r}, for which the memory profile {where} was made",
                "make one for this recipe with d2scale memory, or correct the key",
            )
            for key, (made, asked) in differences(nearest, covers).items()
        ]
    )


def _defaults() -> dict[str, Any]:
    cfg = get_cfg()
    for entry in entry_points(group="d2scale.configs"):
        entry.load()(cfg)
    return dict(flatten(cfg))


def _decoded(value: Any) -> Any:
    """Return what a word of the command line stands for, as the config library reads it."""
    return CfgNode._decode_cfg_value(value)


def _plain(value: Any) -> Any:
    """Return ``value`` as JSON would bring it back."""
    return list(value) if isinstance(value, tuple) else value
