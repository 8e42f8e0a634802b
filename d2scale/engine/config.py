"""Recipes for the default engine, together with what their datasets say."""

from __future__ import annotations

from collections.abc import Sequence

from fvcore.common.config import CfgNode

from d2scale.coco.class_count import with_class_count
from d2scale.config import loading


def load_cfg(path: str, opts: Sequence[str] = ()) -> CfgNode:
    """Return a recipe for training, its model with as many classes as its datasets have.

    See :func:`d2scale.config.load_cfg`. ConfigError with all faults together.
    """
    cfg: CfgNode = with_class_count(loading.load_cfg(path, opts))
    return cfg
