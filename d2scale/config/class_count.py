"""The config key that counts a model's classes, as the model's project tells it."""

from __future__ import annotations

from typing import Any

from d2scale.config.keys import get_key
from d2scale.config.projects import entry_points

# By the name in MODEL.META_ARCHITECTURE: the dotted name of a key.
ENTRY_POINTS = "d2scale.class_counts"


def class_count_key(cfg: Any) -> str | None:
    """Return the key that counts the classes of the model in ``cfg``; None if none is told.

    Its value is a number, or 0: as many as the training dataset has. ``cfg`` is a config of any
    engine, or its settings by dotted key.
    """
    model = get_key(cfg, "MODEL.META_ARCHITECTURE")
    for entry in entry_points(group=ENTRY_POINTS):
        if entry.name == model:
            return str(entry.load())
    return None
