"""d2scale's scaling methods in d2go's registry, and the plan that the ranks of a training share.

d2go calls a method with the config and the new world size and expects it to edit the config in
place; it sets REFERENCE_WORLD_SIZE itself afterwards. It does so before it evaluates or exports,
too, and a method cannot know. So under the Runner the methods wait until training begins.
"""

from __future__ import annotations

from typing import Any

from d2go.config.config import CONFIG_SCALING_METHOD_REGISTRY

from d2scale.config.loading import flatten
from d2scale.d2go.memory import D2GoMemory
from d2scale.detectron2.datasets import annotation_digests
from d2scale.detectron2.memory import TrainingMemory
from d2scale.detectron2.scaling import applied_plan, defrosted, scale_in_place
from d2scale.detectron2.user_errors import exit_together_on_user_error
from d2scale.errors import ConfigError, Fault
from d2scale.launch.comparison import refuse_different_ranks
from d2scale.planning.learning_rate import choose_rule
from d2scale.planning.methods import METHOD_PREFIX, METHODS, method_of
from d2scale.planning.rules import LR_RULE
from d2scale.planning.schedule import Schedule, follows_gain
from d2scale.planning.virtual_ranks import ModelFacts
from d2scale.step import ranks

# An attribute, not a config key: a dumped config must stay a recipe that can be planned again.
_REFERENCE = "_d2scale_reference_world_size"


def names_own_method(cfg: Any) -> bool:
    """Return whether ``SOLVER.AUTO_SCALING_METHODS`` names a method of d2scale."""
    return any(name.startswith(METHOD_PREFIX) for name in cfg.SOLVER.AUTO_SCALING_METHODS)


def leave_scaling_to_training(cfg: Any) -> None:
    """Let the methods that d2go calls on ``cfg`` do nothing: :func:`scale_for_training` will."""
    cfg.__dict__[_REFERENCE] = cfg.SOLVER.REFERENCE_WORLD_SIZE


def scale_for_training(
    cfg: Any,
    memory: TrainingMemory,
    *,
    resume: bool,
    takes_steps: bool = True,
    model: ModelFacts | None = None,
) -> None:
    """Scale ``cfg`` in place by the method of d2scale that it names, if it names one.

    d2go itself calls methods only where the world size differs from the recipe's. Every rank must
    call this. ``takes_steps`` and ``model``: see :func:`scale_in_place`.

    Raises:
        ConfigError: on every rank, if the ranks were given different recipes; and what
            :func:`scale_in_place` raises.
    """
    refuse_different_ranks(dict(flatten(cfg)), annotation_digests(cfg), {"--resume": resume})
    if applied_plan(cfg) is None and names_own_method(cfg):
        reference = cfg.__dict__.pop(_REFERENCE, cfg.SOLVER.REFERENCE_WORLD_SIZE)
        with defrosted(cfg):
            cfg.SOLVER.REFERENCE_WORLD_SIZE = reference
        method = method_of(cfg.SOLVER.AUTO_SCALING_METHODS)
        world_size = ranks.world_size()
        scale_in_place(cfg, world_size, method, memory, takes_steps=takes_steps, model=model)
    elif follows_gain(cfg):
        _refuse_gain_alone(cfg, takes_steps)


def _refuse_gain_alone(cfg: Any, takes_steps: bool) -> None:
    """Refuse the gain rule where no method of d2scale has planned the batch."""
    schedule = Schedule.from_cfg(cfg)
    total = schedule.ims_per_batch
    choose_rule("gain", "keep_total", schedule, total, takes_steps=takes_steps)
    if total == schedule.recipe_ims_per_batch and cfg.SOLVER.AUTO_SCALING_METHODS:
        allowed = "auto, linear, sqrt or none with d2go's own scaling methods"
        advice = (
            "name a d2scale method in SOLVER.AUTO_SCALING_METHODS: _BASE_ d2scale://max_memory.yaml"
        )
        raise ConfigError([Fault(LR_RULE, "gain", allowed, advice)])


def _register(method: str) -> None:
    def scale(cfg: Any, new_world_size: int) -> None:
        if _REFERENCE not in cfg.__dict__:
            with exit_together_on_user_error():
                scale_in_place(cfg, new_world_size, method, D2GoMemory(cfg))

    scale.__name__ = METHOD_PREFIX + method
    CONFIG_SCALING_METHOD_REGISTRY.register(scale)


for _method in METHODS:
    _register(_method)
