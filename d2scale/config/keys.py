"""Reading, writing and comparing values of any engine's config by their dotted names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Each machine may have its own folders and its own number of cores.
OWN_OF_A_MACHINE = (
    *("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "NUMA_BINDING"),
    "D2GO_DATA.DATASETS.COCO_INJECTION.IM_DIRS",
    "D2GO_DATA.DATASETS.COCO_INJECTION.JSON_FILES",
)


def get_key(cfg: Any, key: str, default: Any = None) -> Any:
    """Return the value of a dotted ``key``, or ``default``.

    ``cfg`` is a config of any engine, or its settings by dotted key.
    """
    if key in cfg:
        return cfg[key]
    node = cfg
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            return default
        node = node[part]
    return node


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return both values of the keys that ``old`` and ``new`` have and in which they differ."""
    return {key: (old[key], new[key]) for key in old if key in new and old[key] != new[key]}


def as_json(value: Any) -> Any:
    """Return a config's ``value`` as JSON would bring it back: tuples are lists."""
    return [as_json(entry) for entry in value] if isinstance(value, tuple | list) else value


def set_key(cfg: Any, key: str, value: Any) -> None:
    """Set a dotted ``key`` that exists in ``cfg``, in place."""
    *parents, last = key.split(".")
    node = cfg
    for part in parents:
        node = node[part]
    node[last] = value
