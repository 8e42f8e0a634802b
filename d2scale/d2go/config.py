"""d2go's config node, with shipped configs and faults in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2go.config import CfgNode as D2GoCfgNode

from d2scale.detectron2.config import CheckedNode
from d2scale.detectron2.user_errors import exit_on_user_error


class CfgNode(CheckedNode, D2GoCfgNode):
    """A d2go config that opens ``d2scale://NAME.yaml``."""

    def merge_from_file(self, cfg_filename: str, *args: Any, **kwargs: Any) -> None:
        """Merge a config file, in place."""
        with exit_on_user_error():
            super().merge_from_file(cfg_filename, *args, **kwargs)

    def merge_from_list(self, cfg_list: Sequence[str]) -> None:
        """Merge ``[KEY, VALUE, ...]``, in place."""
        with exit_on_user_error():
            super().merge_from_list(cfg_list)


def for_d2go_alone(cfg: D2GoCfgNode, theirs: D2GoCfgNode, ours: D2GoCfgNode) -> D2GoCfgNode:
    """Return a config that d2go reads without d2scale, to evaluate and export what was trained.

    Args:
        cfg: of d2scale's Runner.
        theirs: the defaults of d2go's runner.
        ours: the defaults of d2scale's Runner. Its keys are left out, but those of a project that
            were set: only d2scale can build that project's models.
    """
    plain = _without_defaults_of_others(cfg, theirs, ours)
    plain.pop("D2SCALE", None)  # it is there where one of its keys was set
    plain.SOLVER.AUTO_SCALING_METHODS = theirs.SOLVER.AUTO_SCALING_METHODS
    return plain


def _without_defaults_of_others(node: Any, theirs: Any, ours: Any) -> D2GoCfgNode:
    kept = D2GoCfgNode()
    for key, value in node.items():
        if isinstance(value, D2GoCfgNode) and key in theirs:
            kept[key] = _without_defaults_of_others(value, theirs[key], ours[key])
        elif key in theirs or value != ours.get(key):
            kept[key] = value
    return kept
