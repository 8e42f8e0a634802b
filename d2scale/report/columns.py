"""The columns of the published comparison, and how their values are written."""

from __future__ import annotations

import math
from typing import Any

# In the order of the published curves; other losses follow.
CURVES = (
    "total_loss",
    "loss_fcos_cls",
    "loss_fcos_ctr",
    "loss_fcos_loc",
    "lr",
    "time",
    "data_time",
)

NOTHING = "–"  # noqa: RUF001  the dash of an empty cell


def show_metric(value: float | None) -> str:
    """Return percent with the three digits of the published tables."""
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"


def show_difference(value: float | None) -> str:
    """Return a difference of percent, with its sign."""
    return NOTHING if value is None or math.isnan(value) else f"{value:+.3f}"


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


def show_duration(seconds: float | None) -> str:
    """Return hours, minutes and seconds as ``11:17:36``."""
    if seconds is None or not math.isfinite(seconds):
        return NOTHING
    whole = round(seconds)
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
