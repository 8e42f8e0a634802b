"""Bring what several runs of a recipe have measured together, for advice on its batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2scale.config.value_rules import is_number
from d2scale.errors import ConfigError, Fault
from d2scale.planning.advice import Advice, Candidate, advise
from d2scale.run_folder.files import METRICS_FILE
from d2scale.run_folder.measurements import Measurements, RecipeNoise


@dataclass(frozen=True)
class Comparison:
    """Advice on a recipe's batch, and what it rests on."""

    advice: Advice
    noise: RecipeNoise
    machine: str  # on which the speeds were measured; empty if that is not known

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON-ready values."""
        own = {"machine": self.machine, "noise_from": self.noise.source}
        return {**self.advice.to_json(), **own, "recipe": dict(self.noise.recipe)}


def compare(runs: Sequence[Measurements], here: Measurements | None = None) -> Comparison:
    """Order the batches of ``runs``, and those measured ``here`` and now, by time.

    With ``here`` the runs of other machines give their noise alone.

    Raises:
        ConfigError: for runs of different recipes, or without ``here`` of different machines; or
            if nothing has measured the noise, or a speed.
    """
    everything = [*runs] if here is None else [here, *runs]
    first = everything[0]
    for other in everything[1:]:
        first.noise.refuse_other_recipe(other.noise)
    noise = _noise(everything)
    machine = next(filter(None, (name_of_machine(one.machine) for one in everything)), "")
    candidates, notes = _candidates(everything, machine, may_differ=here is not None)
    if not candidates:
        allowed = f"runs with times of steps in {METRICS_FILE}"
        sources = ", ".join(run.noise.source for run in runs)
        raise ConfigError([Fault("RUN", sources, allowed, "let one of them take more steps")])
    advice = advise(
        candidates,
        noise.points,
        max_iter=noise.max_iter,
        recipe_ims_per_batch=noise.ims_per_batch,
        notes=[f"the noise is that of {noise.source}", *notes],
    )
    return Comparison(advice, noise, machine)


def _noise(measurements: Sequence[Measurements]) -> RecipeNoise:
    """Return the noise that tells most: of the longest training that keeps its quality."""

    def worth(one: Measurements) -> tuple[Any, ...]:
        points = one.noise.points
        done = min(points[-1].recipe_steps, one.noise.max_iter) if points else 0.0
        # A larger batch has more of the signal, and so a better estimate of it.
        images = max((candidate.ims_per_batch for candidate in one.candidates), default=0)
        return bool(points), one.keeps_quality, done, images

    best = max(measurements, key=worth).noise
    best.refuse_unmeasured("RUN")
    return best


def _candidates(
    measurements: Sequence[Measurements], machine: str, *, may_differ: bool
) -> tuple[list[Candidate], list[str]]:
    """Return the candidates of ``machine``, and notes on those of others or of an unknown one."""
    candidates: list[Candidate] = []
    notes: list[str] = []
    for one in measurements:
        other, source = name_of_machine(one.machine), one.noise.source
        if other and other != machine:
            if not may_differ:
                allowed = f"runs of one machine, as others on {machine}"
                advice = f"leave {source} out, or add the config to measure its speed here"
                raise ConfigError([Fault("machine", other, allowed, advice)])
            notes.append(f"the speed of {source} is left out: it ran on {other}, not {machine}")
        else:
            candidates += one.candidates
            notes += one.notes
            if machine and not other:
                notes.append(f"the machine of {source} is not known")
    return candidates, notes


def name_of_machine(machine: Mapping[str, Any]) -> str:
    """Return what decides a machine's speed, in words, from ``machine.json``; empty if unknown."""
    device = machine.get("device")
    if device == "cpu":
        return f"{machine.get('cpu', 'CPU')}, {machine.get('cpu_cores', 'some')} cores"
    mib: Any = machine.get("device_memory_mb")
    return f"{device}, {mib / 1024:.0f} GiB" if device and is_number(mib) else str(device or "")
