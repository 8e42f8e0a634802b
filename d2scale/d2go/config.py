"""d2go's config node, with shipped configs and faults in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from d2go.config import CfgNode as D2GoCfgNode

from d2scale.config.loading import (
    flatten,
    load_yaml,
    parse_opts,
    resolve_config_path,
    unknown_key_fault,
)
from d2scale.config.safe_yaml import parse_yaml, parse_yaml_as_detectron2
from d2scale.detectron2.user_errors import exit_on_user_error
from d2scale.errors import ConfigError, Fault


class CfgNode(D2GoCfgNode):
    """A d2go config that opens ``d2scale://NAME.yaml``."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
        """Read a file and its ``_BASE_`` chain; ``allow_unsafe`` lets Python tags run."""
        parse = parse_yaml_as_detectron2 if allow_unsafe else parse_yaml
        return D2GoCfgNode(load_yaml(filename, parse))

    def merge_from_file(self, cfg_filename: str, *args: Any, **kwargs: Any) -> None:
        """Merge a config file, in place."""
        with exit_on_user_error():
            path = resolve_config_path(cfg_filename)
            self._refuse_unknown_keys(flatten(load_yaml(path)))
            try:
                super().merge_from_file(path, *args, **kwargs)
            except ValueError as error:
                allowed, reason = "values of the keys' types", " ".join(str(error).split())
                raise ConfigError([Fault("config file", path, allowed, reason)]) from error

    def merge_from_list(self, cfg_list: Sequence[str]) -> None:
        """Merge ``[KEY, VALUE, ...]``, in place."""
        with exit_on_user_error():
            pairs = parse_opts(cfg_list)
            self._refuse_unknown_keys(pairs)
            try:
                super().merge_from_list(list(cfg_list))
            except ValueError as error:
                raise ConfigError(
                    [Fault("KEY VALUE", " ".join(cfg_list), "values of the key's type", f"{error}")]
                ) from error

    def _refuse_unknown_keys(self, settings: Any) -> None:
        known = dict(flatten(self))
        faults = [
            unknown_key_fault(key, value, known)
            for key, value in settings
            if not self._has_or_allows(key)
        ]
        if faults:
            raise ConfigError(faults)

    def _has_or_allows(self, key: str) -> bool:
        node: Any = self
        for part in key.split("."):
            if not isinstance(node, dict) or part not in node:
                return (
                    self.key_is_deprecated(key)
                    or self.key_is_renamed(key)
                    or (isinstance(node, D2GoCfgNode) and node.is_new_allowed())
                )
            node = node[part]
        return True


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
