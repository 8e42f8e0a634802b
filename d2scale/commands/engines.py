"""Which engine runs a recipe, where the user does not say."""

from __future__ import annotations

from d2scale.commands.common import is_lazy_config

_MODEL = "MODEL.META_ARCHITECTURE"


def choose_engine(config_file: str) -> tuple[str, str]:
    """Return the engine for a recipe, ``default``, ``detectron2`` or ``d2go``, and why."""
    from d2scale.config.loading import flatten, load_yaml
    from d2scale.config.projects import entry_points
    from d2scale.config.upstream import is_plain_detectron2
    from d2scale.planning.methods import METHOD_NAMES

    if is_lazy_config(config_file):
        return "detectron2", "the recipe is a LazyConfig"
    settings = dict(flatten(load_yaml(config_file)))
    model = settings.get(_MODEL, "GeneralizedRCNN")
    if any(entry.name == model for entry in entry_points(group="d2scale.models")):
        return "default", f"{_MODEL} {model} is a model of an installed project"
    own = ("D2SCALE.", METHOD_NAMES.key)
    others = [key for key in settings if not key.startswith(own) and not is_plain_detectron2([key])]
    if others:
        return "d2go", f"{others[0]} is no key of detectron2"
    return "detectron2", f"{_MODEL} is {model}, and all keys are detectron2's"
