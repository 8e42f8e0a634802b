"""Scaling a config in place: the plan that the ranks of a training share."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn

from d2scale.config.keys import get_key, set_key
from d2scale.detectron2.memory import TrainingMemory, device_gib_of
from d2scale.detectron2.private_upstream import bare_model
from d2scale.errors import ConfigError, Fault
from d2scale.planning.formats import plan_table
from d2scale.planning.hardware import Hardware
from d2scale.planning.methods import method_of
from d2scale.planning.plan import Plan, make_plan, refuse_more_than_all, refuse_uneven_split
from d2scale.planning.virtual_ranks import SYNCHRONISED, ModelFacts
from d2scale.step import ranks
from d2scale.step.micro_batches import ExactModel
from d2scale.step.norms import plain_norms, synchronised_norms

logger = logging.getLogger(__name__)

# An attribute, not a config key: a dumped config must stay a recipe that can be planned again.
_APPLIED = "_d2scale_plan"


def applied_plan(cfg: Any) -> Plan | None:
    """Return the plan that a method has applied to ``cfg``, if one has."""
    return cfg.__dict__.get(_APPLIED)


def scale_in_place(
    cfg: Any,
    world_size: int,
    method: str,
    memory: TrainingMemory,
    *,
    takes_steps: bool = False,
    model: ModelFacts | None = None,
) -> Plan:
    """Plan the recipe for ``world_size`` ranks and write the plan into ``cfg``.

    ``takes_steps`` says whether d2scale takes the steps, which the gain rule and virtual ranks
    need; ``model`` what is known of the model. Keys that ``cfg`` lacks are passed over.

    Raises:
        ConfigError: on every rank, for a faulty recipe, a plan that the engine cannot run, a method
            applied twice or together with d2go's own.
    """
    methods = tuple(cfg.SOLVER.AUTO_SCALING_METHODS)
    if applied_plan(cfg) is not None:
        advice = "the config is scaled already; call one method, once"
        raise ConfigError([Fault("SOLVER.AUTO_SCALING_METHODS", methods, "one method", advice)])
    method_of(methods)
    plan = _plan_on_ranks(cfg, world_size, method, memory, takes_steps, model)
    with defrosted(cfg):
        for key, (_, value) in plan.changes.items():
            if get_key(cfg, key) is not None:
                set_key(cfg, key, value)
    cfg.__dict__[_APPLIED] = plan
    logger.info("Scaled the config:\n%s", plan_table(plan))
    return plan


def refuse_unplannable(
    cfg: Any,
    world_size: int,
    method: str | None,
    engine: str,
    model: ModelFacts,
    *,
    takes_steps: bool = True,
) -> None:
    """Refuse a recipe that cannot be planned, before ranks start and whatever its memory.

    Raises:
        ConfigError: as :func:`scale_in_place`.
    """
    device_gib = device_gib_of(cfg)
    hardware = Hardware.for_training(
        cfg, world_size, method=method, device_gib=device_gib, engine=engine, make_profile=None
    )
    plan = make_plan(cfg, hardware, method=method, takes_steps=takes_steps, model=model)
    refuse_uneven_split(plan, cfg)


def facts_of_model(model: nn.Module) -> ModelFacts:
    """Return what decides how the steps of a built model can be split."""
    bare = bare_model(model)
    synchronised = SYNCHRONISED if synchronised_norms(bare) else ""
    return ModelFacts(isinstance(bare, ExactModel), synchronised, bool(plain_norms(bare)))


def warn_without_effect(cfg: Any, reasons: Mapping[str, str], engine: str) -> None:
    """Log a line for each key that is set and that an engine ignores, by the key's reason."""
    for key, reason in reasons.items():
        if get_key(cfg, key):
            logger.warning("%s has no effect under %s: %s", key, engine, reason)


def _plan_on_ranks(
    cfg: Any,
    world_size: int,
    method: str,
    memory: TrainingMemory,
    takes_steps: bool,
    model: ModelFacts | None,
) -> Plan:
    """Return rank 0's plan on every rank; where memory is measured, all ranks take part."""
    outcome: Plan | ConfigError | None = None
    device_gib = memory.device_gib()
    if ranks.rank() == 0 or memory.measures:
        try:
            hardware = Hardware.for_training(
                cfg,
                world_size,
                method=method,
                device_gib=device_gib,
                engine=memory.engine,
                make_profile=memory.profile,
                make_variants=memory.variants,
                generation=memory.generation(),
            )
            outcome = make_plan(cfg, hardware, method=method, takes_steps=takes_steps, model=model)
            if method == "max_memory" and not cfg.D2SCALE.IMS_PER_GPU:
                refuse_more_than_all(outcome, memory.batches.images)
            refuse_uneven_split(outcome, cfg)
        except ConfigError as error:
            outcome = error
    outcome = ranks.broadcast_object(outcome)
    if isinstance(outcome, ConfigError):
        raise outcome
    assert outcome is not None
    return outcome


@contextmanager
def defrosted(cfg: Any) -> Iterator[None]:
    """Within the context, ``cfg`` can be changed."""
    frozen = cfg.is_frozen()
    cfg.defrost()
    try:
        yield
    finally:
        if frozen:
            cfg.freeze()
