"""Compare precisions and activation checkpointing within a memory budget."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from d2scale.errors import ConfigError, Fault
from d2scale.planning.coverage import find_profile, name_of_variant, variant
from d2scale.planning.formats import table
from d2scale.planning.hardware import BUDGET, Hardware
from d2scale.planning.plan import Plan, make_plan


@dataclass(frozen=True)
class Choice:
    """A precision and activation checkpointing, with the plan that they allow."""

    amp: bool
    activation_checkpointing: bool
    plan: Plan | None = None  # None if they cannot be planned
    note: str = ""  # why not; empty otherwise

    @property
    def name(self) -> str:
        """The settings in words."""
        return name_of_variant(self.covers({}))

    def covers(self, covers: Mapping[str, Any]) -> dict[str, Any]:
        """Return the settings of a memory profile with this choice."""
        return variant(covers, amp=self.amp, checkpointing=self.activation_checkpointing)


def explore(
    cfg: Any, hardware: Hardware, *, method: str | None = None, lr_rule: str | None = None
) -> tuple[Choice, ...]:
    """Plan the recipe in float32 and with AMP, without and with activation checkpointing.

    ``hardware`` has a profile of the recipe and its variants; the rest is as for ``make_plan``.

    Raises:
        ConfigError: if there is no profile or no budget, or the recipe has faults.
    """
    if hardware.unknown:
        allowed = "with a memory budget and memory profiles (d2scale memory CONFIG --explore)"
        advice = f"give {' and '.join(hardware.unknown)}"
        raise ConfigError([Fault("--explore", True, allowed, advice)])
    return tuple(
        _choice(cfg, hardware, Choice(amp, checkpointing), method, lr_rule)
        for amp, checkpointing in product((False, True), repeat=2)
    )


def _choice(
    cfg: Any, hardware: Hardware, choice: Choice, method: str | None, lr_rule: str | None
) -> Choice:
    """Return ``choice`` with its plan, or with the reason why it has none."""
    assert hardware.profile is not None
    profile = find_profile(hardware.variants, choice.covers(hardware.profile.covers))
    if profile is None:
        return replace(choice, note="no memory profile of this choice")
    try:
        plan = make_plan(cfg, replace(hardware, profile=profile), method=method, lr_rule=lr_rule)
    except ConfigError as error:
        if any(fault.key != BUDGET for fault in error.faults):
            raise
        return replace(choice, note=f"needs {error.faults[0].allowed}")
    return replace(choice, plan=plan)


def choices_table(choices: Sequence[Choice]) -> str:
    """Return the choices as a table."""
    headers = ["choice", "images per GPU", "accumulation steps", "total batch"]
    headers += ["predicted peak GiB", "note"]
    rows = []
    for choice in choices:
        *numbers, peak_gib = _facts(choice).values()
        peak = None if peak_gib is None else f"{peak_gib:.2f}"
        rows.append((choice.name, *numbers, peak, choice.note))
    if not any(choice.note for choice in choices):
        headers, rows = headers[:-1], [row[:-1] for row in rows]
    return table(headers, rows)


def choices_json(choices: Sequence[Choice]) -> str:
    """Return the choices as JSON text."""
    content = []
    for choice in choices:
        settings = {"amp": choice.amp, "activation_checkpointing": choice.activation_checkpointing}
        content.append({**settings, **_facts(choice), "note": choice.note})
    return json.dumps(content, indent=2)


def _facts(choice: Choice) -> dict[str, Any]:
    """Return the numbers by which choices are compared, None without a plan."""
    names = ("ims_per_gpu", "accumulation_steps", "ims_per_batch", "predicted_peak_gib")
    return {name: getattr(choice.plan, name, None) for name in names}
