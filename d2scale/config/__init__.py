"""Configs: the keys, their defaults, and how files are read."""

from d2scale.config.defaults import add_d2scale_config, get_cfg
from d2scale.config.loading import load_cfg, load_recipe

__all__ = ["add_d2scale_config", "get_cfg", "load_cfg", "load_recipe"]
