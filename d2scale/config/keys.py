"""Reading and writing one key of any engine's config by its dotted name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def get_key(cfg: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted ``key`` in any engine's config, or ``default``."""
    node = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def set_key(cfg: Any, key: str, value: Any) -> None:
    """Set a dotted ``key`` that exists in ``cfg``, in place."""
    *parents, last = key.split(".")
    node = cfg
    for part in parents:
        node = node[part]
    node[last] = value
