"""The choices that a memory budget leaves: precision and activation checkpointing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from tabulate import tabulate

from d2scale.errors import ConfigError, Fault
from d2scale.planning.coverage import find_profile, name_of_variant, variant
from d2scale.planning.hardware import BUDGET, Hardware
from d2scale.planning.plan import make_plan


@dataclass(frozen=True)
class Choice:
    """One way to train the recipe.

    Attributes:
        amp, activation_checkpointing: the choice.
        ims_per_gpu, accumulation_steps, ims_per_batch, predicted_peak_gib: as planned; None if
            it cannot be.
        note: why it cannot be; empty otherwise.
    """

    amp: bool
    activation_checkpointing: bool
    ims_per_gpu: int | None = None
    accumulation_steps: int | None = None
    ims_per_batch: int | None = None
    predicted_peak_gib: float | None = None
    note: str = ""

    @property
    def name(self) -> str:
        """The choice in words."""
        return name_of_variant(
            variant({}, amp=self.amp, checkpointing=self.activation_checkpointing)
        )


def explore(
    cfg: Any, hardware: Hardware, *, method: str | None = None, lr_rule: str | None = None
) -> tuple[Choice, ...]:
    """Plan the recipe in float32 and with AMP, without and with activation checkpointing.

    Args:
        cfg: the recipe; it is not changed.
        hardware: with a profile of the recipe and its variants.
        method, lr_rule: as for :func:`d2scale.planning.plan.make_plan`.

    Raises:
        ConfigError: if there is no profile or no budget, or the recipe has faults.
    """
    if hardware.profile is None or hardware.budget_gib is None:
        raise ConfigError([_nothing_to_compare(hardware)])
    return tuple(
        _choice(cfg, hardware, Choice(amp, checkpointing), method, lr_rule)
        for amp, checkpointing in product((False, True), repeat=2)
    )


def _choice(
    cfg: Any, hardware: Hardware, choice: Choice, method: str | None, lr_rule: str | None
) -> Choice:
    """Return ``choice`` with its plan, or with the reason why there is none."""
    assert hardware.profile is not None
    amp, checkpointing = choice.amp, choice.activation_checkpointing
    covers = variant(hardware.profile.covers, amp=amp, checkpointing=checkpointing)
    profile = find_profile(hardware.variants, covers)
    if profile is None:
        return replace(choice, note="no memory profile of this choice")
    try:
        plan = make_plan(cfg, replace(hardware, profile=profile), method=method, lr_rule=lr_rule)
    except ConfigError as error:
        if any(fault.key != BUDGET for fault in error.faults):
            raise
        return replace(choice, note=f"needs {error.faults[0].allowed}")
    return replace(
        choice,
        ims_per_gpu=plan.ims_per_gpu,
        accumulation_steps=plan.accumulation_steps,
        ims_per_batch=plan.ims_per_batch,
        predicted_peak_gib=plan.predicted_peak_gib,
    )


def to_table(choices: Sequence[Choice]) -> str:
    """Return the choices for a reader."""
    rows = [
        (
            choice.name,
            _show(choice.ims_per_gpu),
            _show(choice.accumulation_steps),
            _show(choice.ims_per_batch),
            "" if choice.predicted_peak_gib is None else f"{choice.predicted_peak_gib:.2f}",
            choice.note,
        )
        for choice in choices
    ]
    headers = ["choice", "images per GPU", "accumulation steps", "total batch"]
    headers += ["predicted peak GiB", "note"]
    if not any(choice.note for choice in choices):
        headers, rows = headers[:-1], [row[:-1] for row in rows]  # type: ignore[misc]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True)


def to_json(choices: Sequence[Choice]) -> str:
    """Return the choices as JSON text."""
    return json.dumps([asdict(choice) for choice in choices], indent=2)


def _show(value: int | None) -> str:
    return "" if value is None else str(value)


def _nothing_to_compare(hardware: Hardware) -> Fault:
    missing = []
    if hardware.budget_gib is None:
        missing.append("--gpu-memory-gib")
    if hardware.profile is None:
        missing.append("--profile, from d2scale memory CONFIG --explore -o FILE")
    return Fault(
        "--explore", True, "with a memory budget and a memory profile", f"give {', '.join(missing)}"
    )
