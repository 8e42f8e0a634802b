"""Memory profiles for a reader. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence

from tabulate import tabulate

from d2scale.planning.coverage import CHECKPOINTING, PRECISION
from d2scale.planning.memory_profile import GIB, MemoryProfile

# Device memory in GiB that many GPUs have.
_USUAL_GIB = (8, 11, 16, 24, 40, 80)


def to_table(profiles: Sequence[MemoryProfile], fraction: float) -> str:
    """Return what the profiles say.

    Args:
        profiles: at least one.
        fraction: part of a device's memory that a prediction may fill.
    """
    parts = []
    for profile in profiles:
        lines = [f"{profile.source}: {profile.description}", "", _points(profile), ""]
        share = profile.share_to_fill(fraction)
        fits = [
            (f"{gib} GiB", profile.largest_ims_per_gpu(gib * share * GIB)) for gib in _USUAL_GIB
        ]
        header = f"images per GPU in {share:g} of the memory"
        lines.append(tabulate(fits, headers=["GPU", header], tablefmt="pipe"))
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def name_of_variant(profile: MemoryProfile) -> str:
    """Return what tells the profile from those of the same recipe: precision, checkpointing."""
    half = profile.covers.get(PRECISION) == "16 bit"
    parts = ["AMP" if half else "float32"]
    if profile.covers.get(CHECKPOINTING):
        parts.append("activation checkpointing")
    return ", ".join(parts)


def _points(profile: MemoryProfile) -> str:
    rows = [
        (
            point.ims_per_gpu,
            _gib(point.live_bytes),
            _gib(point.reserved_bytes),
            "" if point.needed_bytes is None else _gib(point.needed_bytes),
            _gib(profile.peak_bytes(point.ims_per_gpu)),
        )
        for point in profile.points
    ]
    headers = [
        *("images per GPU", "live GiB", "reserved GiB", "needed GiB"),
        f"with {_gib(profile.context_bytes)} GiB for the runtime",
    ]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def _gib(nbytes: int) -> str:
    return f"{nbytes / GIB:.2f}"
