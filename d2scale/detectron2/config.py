"""detectron2's config with d2scale's keys, and faults in one line."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2 import config as upstream
from fvcore.common.config import CfgNode as FvcoreCfgNode

from d2scale.config.defaults import add_d2scale_config
from d2scale.config.loading import (
    flatten,
    load_yaml,
    parse_opts,
    resolve_config_path,
    unknown_key_fault,
)
from d2scale.config.own_datasets import add_own_datasets_keys
from d2scale.config.safe_yaml import parse_yaml, parse_yaml_as_detectron2
from d2scale.errors import ConfigError, Fault

# What planning and resuming read besides detectron2's keys. None of d2go's stands for more here.
_METHODS = "AUTO_SCALING_METHODS"
_OPTIMIZER = "OPTIMIZER"


class CheckedNode(FvcoreCfgNode):
    """A config node that opens ``d2scale://NAME.yaml`` and refuses what is wrong in one line."""

    @classmethod
    def load_yaml_with_base(cls, filename: str, allow_unsafe: bool = False) -> Any:
        """Read a file and its ``_BASE_`` chain; ``allow_unsafe`` lets Python tags run."""
        parse = parse_yaml_as_detectron2 if allow_unsafe else parse_yaml
        return cls(load_yaml(filename, parse))

    def merge_from_file(self, cfg_filename: str, *args: Any, **kwargs: Any) -> None:
        """Merge a config file, in place; ConfigError with all keys that do not exist."""
        path = resolve_config_path(cfg_filename)
        self._refuse_unknown_keys(flatten(load_yaml(path)))
        try:
            super().merge_from_file(path, *args, **kwargs)
        except ValueError as error:
            allowed, reason = "values of the keys' types", " ".join(str(error).split())
            raise ConfigError([Fault("config file", path, allowed, reason)]) from error

    def merge_from_list(self, cfg_list: Sequence[str]) -> None:
        """Merge ``[KEY, VALUE, ...]``, in place; ConfigError as by :meth:`merge_from_file`."""
        self._refuse_unknown_keys(parse_opts(cfg_list))
        try:
            super().merge_from_list(list(cfg_list))
        except ValueError as error:
            words = " ".join(cfg_list)
            fault = Fault("KEY VALUE", words, "values of the key's type", f"{error}")
            raise ConfigError([fault]) from error

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
                    or (isinstance(node, FvcoreCfgNode) and node.is_new_allowed())
                )
            node = node[part]
        return True


class CfgNode(CheckedNode, upstream.CfgNode):
    """A detectron2 config node."""


def load_cfg(path: str, opts: Sequence[str] = ()) -> CfgNode:
    """Return a recipe for detectron2: its defaults, d2scale's keys, a file, ``KEY VALUE`` pairs.

    detectron2's own rules hold for the file: Python tags run. ConfigError with all faults.
    """
    cfg = CfgNode(with_d2scale_keys(upstream.get_cfg()))
    cfg.merge_from_file(path)
    cfg.merge_from_list(opts)
    return cfg


def with_d2scale_keys(cfg: Any) -> Any:
    """Return a copy of a detectron2 config, thawed, with what it lacks of d2scale's keys."""
    cfg = cfg.clone()
    cfg.defrost()
    if "D2SCALE" not in cfg:
        add_d2scale_config(cfg)
    add_own_datasets_keys(cfg)
    cfg.SOLVER.setdefault(_METHODS, ())
    # What detectron2 builds; a trainer's own optimizer follows the rule that the user gives.
    cfg.SOLVER.setdefault(_OPTIMIZER, "sgd")
    return cfg


def without_default_keys(cfg: Any) -> Any:
    """Return a copy of ``cfg`` for ``config.yaml``, which plain detectron2 can read.

    d2scale's keys are left out where they have their defaults.
    """
    cfg = cfg.clone()
    cfg.defrost()
    defaults = type(cfg)()
    add_d2scale_config(defaults)
    add_own_datasets_keys(defaults)
    cfg.SOLVER.pop(_METHODS, None)
    cfg.SOLVER.pop(_OPTIMIZER, None)
    _drop_equal(cfg, "D2SCALE", defaults.D2SCALE)
    _drop_equal(cfg, "D2GO_DATA", defaults.D2GO_DATA)
    return cfg


def _drop_equal(node: Any, name: str, defaults: Any) -> None:
    section = node[name]
    for key, default in defaults.items():
        if isinstance(default, dict):
            _drop_equal(section, key, default)
        elif section.get(key) == default:
            del section[key]
    if not section:
        del node[name]
