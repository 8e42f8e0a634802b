"""The config key that counts a model's classes, as the model's project tells it."""

from __future__ import annotations

import importlib
from typing import Any

from d2scale.config.keys import get_key
from d2scale.config.projects import entry_points


def class_count_key(cfg: Any) -> str | None:
    """Return the key that counts the classes of the model in ``cfg``; None if none is told.

    Its value is a number, or 0: as many as the training dataset has. ``cfg`` is a config of any
    engine, or its settings by dotted key. A project tells it in the module of its entry point in
    the group ``d2scale.configs``, by the name in ``MODEL.META_ARCHITECTURE``::

        CLASS_COUNT_KEYS = {"MyDetector": "MODEL.MY_HEAD.NUM_CLASSES"}
    """
    model = get_key(cfg, "MODEL.META_ARCHITECTURE")
    for entry in entry_points(group="d2scale.configs"):
        keys = getattr(importlib.import_module(entry.module), "CLASS_COUNT_KEYS", {})
        if model in keys:
            return str(keys[model])
    return None
