"""Which engine runs a recipe, where the user does not say."""

from __future__ import annotations


def choose_engine(config_file: str) -> tuple[str, str]:
    """Return the engine for a recipe, ``default``, ``detectron2`` or ``d2go``, and why."""
    from d2scale.config.loading import flatten, load_yaml
    from d2scale.config.upstream import engine_of, is_lazy_config

    if is_lazy_config(config_file):
        return "detectron2", "the recipe is a LazyConfig"
    return engine_of(dict(flatten(load_yaml(config_file))))
