"""d2scale's scaling methods in d2go's registry.

d2go calls a method with the config and the new world size and expects it to edit the config in
place; it sets REFERENCE_WORLD_SIZE itself afterwards.
"""

from __future__ import annotations

import logging
from typing import Any

from d2go.config.config import CONFIG_SCALING_METHOD_REGISTRY

from d2scale.config.keys import set_key
from d2scale.d2go.config import exit_on_user_error
from d2scale.errors import ConfigError, Fault
from d2scale.planning.formats import plan_table
from d2scale.planning.methods import METHOD_PREFIX, METHODS, method_of
from d2scale.planning.plan import Plan, make_plan

logger = logging.getLogger(__name__)

# An attribute, not a config key: a dumped config must stay a recipe that can be planned again.
_APPLIED = "_d2scale_plan"


def applied_plan(cfg: Any) -> Plan | None:
    """Return the plan that a method has already applied to ``cfg``, if one has."""
    return cfg.__dict__.get(_APPLIED)


def names_own_method(cfg: Any) -> bool:
    """Tell whether ``SOLVER.AUTO_SCALING_METHODS`` names a method of d2scale."""
    return any(name.startswith(METHOD_PREFIX) for name in cfg.SOLVER.AUTO_SCALING_METHODS)


def scale_in_place(cfg: Any, world_size: int, method: str) -> Plan:
    """Plan the recipe for ``world_size`` ranks and write the plan into ``cfg``.

    Raises:
        ConfigError: for a faulty recipe, a plan that d2go cannot run, a method applied twice or
            together with d2go's own.
    """
    methods = tuple(cfg.SOLVER.AUTO_SCALING_METHODS)
    if applied_plan(cfg) is not None:
        advice = "the config is scaled already; call one method, once"
        raise ConfigError([Fault("SOLVER.AUTO_SCALING_METHODS", methods, "one method", advice)])
    method_of(methods)
    # Only here, for planning alone needs no model.
    from d2scale.d2go.memory import hardware_for_training, refuse_more_than_images

    plan = make_plan(cfg, hardware_for_training(cfg, world_size, method), method=method)
    refuse_more_than_images(plan, cfg)
    _refuse_uneven_split(plan)
    frozen = cfg.is_frozen()
    cfg.defrost()
    try:
        for key, (_, value) in plan.changes.items():
            set_key(cfg, key, value)
        cfg.__dict__[_APPLIED] = plan
    finally:
        if frozen:
            cfg.freeze()
    logger.info("Scaled the config:\n%s", plan_table(plan))
    return plan


def _refuse_uneven_split(plan: Plan) -> None:
    if plan.ims_per_batch % plan.world_size:
        raise ConfigError(
            [
                Fault(
                    "SOLVER.IMS_PER_BATCH",
                    plan.ims_per_batch,
                    f"a multiple of {plan.world_size} processes, because detectron2's loader "
                    "gives every process as many images",
                    "use another number of processes, the method d2scale_per_gpu, or d2scale train",
                )
            ]
        )


def _register(method: str) -> None:
    def scale(cfg: Any, new_world_size: int) -> None:
        with exit_on_user_error(on_all_ranks=True):
            scale_in_place(cfg, new_world_size, method)

    scale.__name__ = METHOD_PREFIX + method
    CONFIG_SCALING_METHOD_REGISTRY.register(scale)


for _method in METHODS:
    _register(_method)
