"""How values are written in the tables of a report."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Hashable)
NOTHING = "–"  # noqa: RUF001  the dash of an empty cell


def show_metric(value: float | None, sign: str = "") -> str:
    """Return percent with the three digits of the published tables; with its sign for "+"."""
    return NOTHING if value is None or math.isnan(value) else f"{value:{sign}.3f}"


def show_number(value: Any, digits: int = 4) -> str:
    """Return a number in a few digits, any other value as it is."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return NOTHING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.{digits}g}" if abs(value) < 10**digits else f"{value:.0f}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value)) or NOTHING
    return str(value)


def join_names(names_by_key: Iterable[tuple[Key, str]]) -> dict[Key, str]:
    """Return the names of each key as ``a, b``, in order of appearance."""
    joined: dict[Key, str] = {}
    for key, name in names_by_key:
        joined[key] = f"{joined[key]}, {name}" if key in joined else name
    return joined


def show_count(value: float | None) -> str:
    """Return a whole number as ``480 000``."""
    return NOTHING if value is None else f"{round(value):,}".replace(",", " ")


def show_memory(mebibytes: float | None) -> str:
    """Return memory in GiB."""
    return NOTHING if mebibytes is None else f"{mebibytes / 1024:.2f} GiB"


def show_duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds as ``11:17:36``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
