"""Which of the measured batches reaches the recipe's quality soonest. Numbers in, numbers out.

A batch takes as many steps as its gain asks for (see :mod:`d2scale.planning.gain`), so images a
second alone do not order batches: what counts is the time for all images that a batch needs.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2scale.planning.gain import NoisePoint, steps_needed, typical_noise_scale

# Another batch than the recipe's must save this part of the time: speeds are not known better.
_WORTH_A_CHANGE = 0.02
# How much faster more of the same micro-batches in a step may be: the update is saved.
_SAME_SPEED = 1.25
# The part of a training from which on its noise counts as known.
MOST_OF_A_TRAINING = 0.9
_NOT_IN_A_ROW = ("candidate", "noise")
# Words of the settings that name_of_variant gives.
_SETTINGS = ("float32", "AMP", "activation checkpointing")


@dataclass(frozen=True)
class Candidate:
    """A batch, and its speed if that was measured."""

    ims_per_batch: int  # images in one optimizer step
    world_size: int | None = None  # GPUs
    ims_per_gpu: int | None = None  # images in the largest micro-batch
    setting: str = ""  # precision, and activation checkpointing if it is on
    images_per_second: float | None = None  # in training steps; None: not measured
    source: str = ""  # where it was measured
    fills_memory: bool = False  # no more images per GPU fit
    # Of its own training by the gain rule, if that came near its end; empty: as that of others.
    noise: tuple[NoisePoint, ...] = ()


@dataclass(frozen=True)
class Row:
    """What a batch needs for the recipe's quality, by the gain rule."""

    candidate: Candidate
    steps: int
    images: int
    efficiency: float  # progress of an image over that in the recipe's batch
    seconds: float | None  # of training steps; None: its speed was not measured

    def to_json(self) -> dict[str, Any]:
        """Return all numbers as JSON-ready values."""
        content = {**vars(self.candidate), **vars(self)}
        return {name: value for name, value in content.items() if name not in _NOT_IN_A_ROW}


@dataclass(frozen=True)
class Advice:
    """The measured batches of a recipe beside each other."""

    recipe_ims_per_batch: int  # images in a step of the recipe (B0)
    max_iter: int  # steps of the recipe
    noise: tuple[NoisePoint, ...]
    rows: tuple[Row, ...]  # by setting, GPUs and total batch; one at least has a time
    best: Row
    reason: str  # a sentence: why that one
    notes: tuple[str, ...] = ()  # what was not measured, and how far to trust the rest

    def to_json(self) -> dict[str, Any]:
        """Return the advice as JSON-ready values; an infinite noise scale is None."""
        return {
            "reason": self.reason,
            "best": self.best.to_json(),
            "rows": [row.to_json() for row in self.rows],
            "notes": list(self.notes),
            "recipe_ims_per_batch": self.recipe_ims_per_batch,
            "max_iter": self.max_iter,
            # JSON has no word for what is infinite.
            "noise": [[at, scale if math.isfinite(scale) else None] for at, scale in self.noise],
        }


def advise(
    candidates: Iterable[Candidate],
    noise: Sequence[NoisePoint],
    *,
    max_iter: int,
    recipe_ims_per_batch: int,
    notes: Sequence[str] = (),
) -> Advice:
    """Order batches by the time to the recipe's quality.

    Args:
        candidates: with a measured speed, one at least. Measurements of the same batch are joined
            to their median. The recipe's own batch is added, without a time, if it is not there.
        noise: one point at least, as for :func:`~d2scale.planning.gain.steps_needed`.
        max_iter: steps of the recipe.
        recipe_ims_per_batch: images in a step of the recipe.
        notes: what else the reader should know.
    """
    candidates = [*candidates]
    known = _joined(candidates)
    if all(candidate.ims_per_batch != recipe_ims_per_batch for candidate in known):
        known.append(Candidate(recipe_ims_per_batch))
    rows = [_row(candidate, noise, max_iter, recipe_ims_per_batch) for candidate in known]
    rows.sort(key=_order)
    best, recipe = _best(rows, recipe_ims_per_batch)
    limit = _limit(rows, typical_noise_scale(noise, max_iter))
    reason = f"{_reason(best, recipe, rows)}; {limit}"
    return Advice(
        recipe_ims_per_batch,
        max_iter,
        tuple(noise),
        tuple(rows),
        best,
        reason,
        (*notes, *_unsteady(candidates), *_notes(known, noise, max_iter)),
    )


def _joined(candidates: Iterable[Candidate]) -> list[Candidate]:
    """Return one candidate for all measurements of the same batch, with their median speed."""
    groups: dict[Candidate, list[Candidate]] = {}
    for candidate in candidates:
        key = replace(candidate, images_per_second=None, source="", fills_memory=False, noise=())
        groups.setdefault(key, []).append(candidate)
    return [
        replace(
            key,
            images_per_second=statistics.median(c.images_per_second or 0.0 for c in group),
            source=", ".join(dict.fromkeys(c.source for c in group)),
            fills_memory=any(c.fills_memory for c in group),
            noise=next((c.noise for c in group if c.noise), ()),
        )
        for key, group in groups.items()
    ]


def _row(candidate: Candidate, noise: Sequence[NoisePoint], max_iter: int, recipe: int) -> Row:
    total, speed = candidate.ims_per_batch, candidate.images_per_second
    exact = max_iter * recipe / total
    if total > recipe:  # a smaller batch keeps the quality by the linear rule alone
        exact = steps_needed(candidate.noise or noise, max_iter, total, recipe)
    # Sums of parts may end a rounding error above a whole number.
    steps = math.ceil(round(exact, 6))
    return Row(
        candidate,
        steps,
        images=steps * total,
        efficiency=max_iter * recipe / (exact * total),
        seconds=None if speed is None else exact * total / speed,
    )


def _order(row: Row) -> tuple[Any, ...]:
    one = row.candidate
    return one.setting, one.world_size or 0, one.ims_per_batch, one.ims_per_gpu or 0


def _seconds(row: Row) -> float:
    return math.inf if row.seconds is None else row.seconds


def _best(rows: Sequence[Row], recipe_ims_per_batch: int) -> tuple[Row, Row | None]:
    """Return the best row, and the recipe's own batch to compare it with if that was measured."""
    best = min(rows, key=_seconds)
    own = [
        row
        for row in rows
        if row.candidate.ims_per_batch == recipe_ims_per_batch and row.seconds is not None
    ]
    if not own:
        return best, None
    fastest = min(own, key=_seconds)
    if _seconds(best) > (1 - _WORTH_A_CHANGE) * _seconds(fastest):
        best = fastest
    return best, min((row for row in own if _alike(row, best)), key=_seconds, default=fastest)


def _alike(row: Row, other: Row) -> bool:
    """Return whether two rows differ in nothing but the images of a step."""
    one, two = row.candidate, other.candidate
    return (one.setting, one.world_size) == (two.setting, two.world_size)


def _reason(best: Row, recipe: Row | None, rows: Sequence[Row]) -> str:
    """Return why ``best`` is the best, as a sentence without a full stop."""
    total = best.candidate.ims_per_batch
    if recipe is None:
        return (
            f"{_name(best)} are the fastest of those that were measured; the recipe's own batch "
            "was not, so what they save is not known"
        )
    if total != recipe.candidate.ims_per_batch:
        start = "filling the memory with " if best.candidate.fills_memory else ""
        saves = "saves" if start else "save"
        saved = _percent(1 - _seconds(best) / _seconds(recipe))
        against = f"the recipe's {recipe.candidate.ims_per_batch}"
        if not _alike(best, recipe):
            against += f" in {_circumstances(recipe)}"
        return f"{start}{_name(best)} {saves} {saved} against {against}: {_compared(best, recipe)}"
    text = f"the recipe's own batch of {total} is best"
    others = [
        row for row in rows if row.candidate.ims_per_batch != total and row.seconds is not None
    ]
    if not others:
        return f"{text}: no other batch was measured that can be compared"
    rival = min(others, key=lambda row: (not _alike(row, best), _seconds(row)))
    return f"{text}: {_name(rival)}, the next, {_compared(rival, best).removeprefix('they ')}"


def _name(row: Row) -> str:
    count = row.candidate.ims_per_batch
    return f"{count} image{'s' if count > 1 else ''} a step"


def _circumstances(row: Row) -> str:
    gpus = row.candidate.world_size
    where = f" on {gpus} GPU{'' if gpus == 1 else 's'}" if gpus else ""
    return f"{row.candidate.setting}{where}"


def _compared(row: Row, other: Row) -> str:
    speeds = row.candidate.images_per_second, other.candidate.images_per_second
    assert speeds[0]
    assert speeds[1]
    faster = _more(speeds[0] / speeds[1] - 1)
    return f"they show {faster} a second and need {_more(row.images / other.images - 1)}"


def _more(part: float) -> str:
    return f"{_percent(abs(part))} {'more' if part >= 0 else 'fewer'} images"


def _percent(part: float) -> str:
    return f"{100 * part:.{0 if part >= 0.0095 else 1}f} %"


def _limit(rows: Sequence[Row], noise_scale: float) -> str:
    """Return from which batch on more images do not help."""
    largest = max(row.candidate.ims_per_batch for row in rows if row.seconds is not None)
    if noise_scale > largest:
        scale = "" if math.isinf(noise_scale) else f", {noise_scale:.0f} images,"
        return (
            f"the median noise scale{scale} lies above all measured batches, so a still larger one "
            "may save more"
        )
    return (
        f"above {noise_scale:.3g} images a step, the median noise scale, the noise is no longer "
        "the limit"
    )


def _unsteady(candidates: Iterable[Candidate]) -> Iterator[str]:
    """Yield where steps of the same micro-batches differ in speed as they should not."""
    speeds: dict[tuple[Any, ...], list[float]] = {}
    for one in candidates:
        place = one.ims_per_gpu, one.world_size, one.setting
        speeds.setdefault(place, []).append(one.images_per_second or 0.0)
    for (ims_per_gpu, _, setting), values in speeds.items():
        if ims_per_gpu and max(values) > _SAME_SPEED * min(values):
            yield (
                f"{ims_per_gpu} images per GPU in {setting} did {min(values):.3g} to "
                f"{max(values):.3g} images a second: the machine was probably busy, so measure "
                "again before you trust the times"
            )


def _notes(known: Sequence[Candidate], noise: Sequence[NoisePoint], max_iter: int) -> Iterator[str]:
    until = noise[-1].recipe_steps
    if until < MOST_OF_A_TRAINING * max_iter:
        yield (
            f"the noise covers the first {until:.0f} of {max_iter} steps of the recipe; it grows "
            "in a training, so a larger batch is worth at least that"
        )
    settings = " / ".join(candidate.setting for candidate in known)
    if missing := [name for name in _SETTINGS if name not in settings]:
        yield f"not measured: {', '.join(missing)}"
    if any(candidate.noise for candidate in known):
        yield "steps of a batch that was trained by the gain rule are those that its own noise gave"
    yield (
        "times are those of training steps, without evaluations: of larger batches than the "
        "recipe's by the gain rule, of smaller ones by the linear rule"
    )
