"""Plan how a recipe runs on the hardware at hand, with the reason for each choice."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2scale.config.keys import differences, get_key, set_key
from d2scale.config.value_rules import judge, one_of
from d2scale.errors import ConfigError, DataError, Fault
from d2scale.planning import rules
from d2scale.planning.batch import BATCH_RULES, decide_batch
from d2scale.planning.gain import NoisePoint, range_of_steps, steps_needed
from d2scale.planning.hardware import Hardware
from d2scale.planning.learning_rate import choose_rule, rule_notes
from d2scale.planning.methods import METHODS, method_faults, method_of
from d2scale.planning.schedule import Schedule, schedule_faults, schedule_notes
from d2scale.planning.virtual_ranks import ModelFacts


@dataclass(frozen=True)
class Plan:
    """How a recipe runs on some hardware."""

    method: str  # per_gpu, keep_total or max_memory
    world_size: int  # ranks (N)
    ims_per_gpu: int  # images in the largest micro-batch of any rank (m)
    accumulation_steps: int  # most micro-batches of any rank in one optimizer step (a)
    ims_per_batch: int  # images in one optimizer step (B)
    batch_ratio: float  # k = B / B0
    lr_rule: str  # linear, sqrt, none or gain
    steps: tuple[int, int]  # fewest and most optimizer steps of the whole training
    predicted_peak_gib: float | None  # device memory of one rank, None if no profile is at hand
    changes: dict[str, tuple[Any, Any]]  # config key to (recipe's value, planned value)
    notes: tuple[str, ...]  # the reasons, and what the user should know
    expected_steps: int | None = None  # by the gain rule, if the noise scale is known
    # The recipe's ranks that the GPUs run in turn, each with as many images; 0: they do not.
    virtual_ranks: int = 0
    sync_bn: bool = False  # batch norm takes its statistics from the images of all GPUs

    def apply(self, cfg: Any) -> Any:
        """Return a copy of ``cfg`` with the planned values; keys it lacks are passed over."""
        planned = cfg.clone()
        frozen = planned.is_frozen()
        planned.defrost()
        for key, (_, value) in self.changes.items():
            if get_key(planned, key) is not None:
                set_key(planned, key, value)
        if frozen:
            planned.freeze()
        return planned

    def with_micro_batches_of(self, ims_per_gpu: int) -> Plan:
        """Return the plan once a run takes ``ims_per_gpu`` images at a time.

        An out-of-memory error makes them fewer, and some time without one more.
        """
        if ims_per_gpu == self.ims_per_gpu:
            return self
        parts = self.virtual_ranks or self.world_size
        sizes = rules.micro_batch_sizes(self.ims_per_batch, parts, ims_per_gpu)
        turns = -(-parts // self.world_size)
        change = f"from {self.ims_per_gpu} to {ims_per_gpu} during the run"
        note = f"images per GPU cut {change}, by an out-of-memory error"
        if ims_per_gpu > self.ims_per_gpu:
            note = f"images per GPU raised {change}: they fit again"
        return replace(
            self,
            ims_per_gpu=max(map(max, sizes)),
            accumulation_steps=turns * max(map(len, sizes)),
            # It was too low, or other programs have taken memory.
            predicted_peak_gib=None,
            notes=(*self.notes, note),
        )

    def with_noise(self, noise: Sequence[NoisePoint]) -> Plan:
        """Return the plan with the steps to expect if the noise scale is that of another run.

        ``noise`` has one point at least. Without the gain rule nothing changes.
        """
        if self.lr_rule != "gain":
            return self
        recipe_ims_per_batch = round(self.ims_per_batch / self.batch_ratio)
        max_iter = self.steps[0 if self.batch_ratio < 1 else 1]
        steps = steps_needed(noise, max_iter, self.ims_per_batch, recipe_ims_per_batch)
        return replace(self, expected_steps=math.ceil(steps))

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values, in the documented order."""
        content = dict(vars(self))
        content["changes"] = {key: list(pair) for key, pair in self.changes.items()}
        content["steps"], content["notes"] = list(self.steps), list(self.notes)
        return content


def make_plan(
    cfg: Any,
    hardware: Hardware,
    *,
    method: str | None = None,
    lr_rule: str | None = None,
    takes_steps: bool = True,
    model: ModelFacts | None = None,
) -> Plan:
    """Decide how the recipe in ``cfg`` runs on ``hardware``.

    Args:
        cfg: a detectron2, d2go or d2scale config.
        method: one of ``METHODS``; None: the one that ``SOLVER.AUTO_SCALING_METHODS`` names, or
            else ``keep_total``, which changes nothing about the training.
        lr_rule: one of ``rules.LR_RULES``; None takes ``D2SCALE.LR_RULE``.
        takes_steps: whether d2scale takes the steps: gain rule and virtual ranks need that.
        model: what is known of it; None: what its name tells.

    Raises:
        ConfigError: with all faults of the recipe and the request.
    """
    method, lr_rule = _checked_request(cfg, method, lr_rule)
    schedule = Schedule.from_cfg(cfg)
    model = (model or ModelFacts.of_recipe(cfg)) if takes_steps else None
    batch = decide_batch(cfg, method, schedule, hardware, model)
    total, notes = batch.ims_per_batch, (*schedule_notes(cfg, schedule), *batch.notes)
    rule = choose_rule(lr_rule, method, schedule, total, takes_steps=takes_steps)
    planned = schedule.scaled(total, hardware.world_size, rule)
    return Plan(
        method=method,
        world_size=hardware.world_size,
        **batch.sizes(),
        batch_ratio=total / schedule.recipe_ims_per_batch,
        lr_rule=rule,
        steps=range_of_steps(planned.max_iter, total, planned.recipe_ims_per_batch),
        predicted_peak_gib=hardware.peak_gib(batch.ims_per_gpu, accumulates=batch.accumulates),
        changes=_changes(cfg, schedule, planned, rule),
        notes=(*notes, *rule_notes(lr_rule, rule, schedule, planned)),
    )


def refuse_more_than_all(plan: Plan, images: int) -> None:
    """Raise a DataError if ``max_memory`` chose a total batch larger than the dataset.

    ``images`` are those of the training dataset, 0 if that is not known.
    """
    if plan.method == "max_memory" and 0 < images < plan.ims_per_batch:
        advice = f"set D2SCALE.MAX_IMS_PER_BATCH to at most {images}, or train on more images"
        allowed = f"at least the {plan.ims_per_batch} images of the chosen total batch"
        raise DataError([Fault("images in DATASETS.TRAIN", images, allowed, advice)])


def refuse_uneven_split(plan: Plan, cfg: Any) -> None:
    """Raise a ConfigError for a plan that only the default engine can run."""
    if plan.ims_per_batch % plan.world_size == 0 or plan.virtual_ranks:
        return
    allowed = (
        f"a multiple of {plan.world_size} processes, because detectron2's loader gives every "
        "process as many images"
    )
    ways = ["use another number of processes", "the method per_gpu"]
    if get_key(cfg, rules.VIRTUAL_RANKS, "auto") == "off":
        ways.append(f"{rules.VIRTUAL_RANKS} auto")
    if ModelFacts.of_recipe(cfg).tells_normalizers:  # a project's own
        ways.append("d2scale train --engine default")
    advice = f"{', '.join(ways[:-1])} or {ways[-1]}"
    raise ConfigError([Fault("SOLVER.IMS_PER_BATCH", plan.ims_per_batch, allowed, advice)])


def _changes(
    cfg: Any, schedule: Schedule, planned: Schedule, rule: str
) -> dict[str, tuple[Any, Any]]:
    changes = differences(schedule.to_config(), planned.to_config())
    if rule == "gain":  # the other rules have done their work once the schedule is scaled
        changes |= differences({rules.LR_RULE: get_key(cfg, rules.LR_RULE)}, {rules.LR_RULE: rule})
    return changes


def _checked_request(cfg: Any, method: str | None, lr_rule: str | None) -> tuple[str, str]:
    """Return the method and the rule that are asked for; ConfigError with all faults."""
    lr_rule = lr_rule or get_key(cfg, rules.LR_RULE, "auto")
    if faults := [*schedule_faults(cfg), *_request_faults(cfg, method, lr_rule)]:
        raise ConfigError(faults)
    return method or method_of(get_key(cfg, "SOLVER.AUTO_SCALING_METHODS", ())), lr_rule


def _request_faults(cfg: Any, method: str | None, lr_rule: str) -> list[Fault]:
    if method is None:
        faults = method_faults(get_key(cfg, "SOLVER.AUTO_SCALING_METHODS", ()))
    else:
        faults = one_of("method", METHODS).faults(method)
    faults += one_of(rules.LR_RULE, rules.LR_RULES).faults(lr_rule)
    return faults + judge(cfg, BATCH_RULES)
