"""What a training has measured on its way: its speed and its noise, read from a run's folder."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from fvcore.common.config import CfgNode

from d2scale.config.keys import differences
from d2scale.config.loading import load_recipe, load_yaml
from d2scale.config.value_rules import is_number, is_whole
from d2scale.errors import ConfigError, Fault
from d2scale.planning.advice import MOST_OF_A_TRAINING, Candidate
from d2scale.planning.batch import FIT_IN
from d2scale.planning.coverage import name_of_variant, variant
from d2scale.planning.gain import NoisePoint
from d2scale.planning.progress import recipe_of
from d2scale.planning.rules import gain_is_proven_for
from d2scale.planning.schedule import Schedule, schedule_faults
from d2scale.run_folder.contents import read_json
from d2scale.run_folder.files import (
    CONFIG_FILE,
    MACHINE_FILE,
    METRICS_FILE,
    PLAN_FILE,
    reason_of,
)

_IMS_PER_BATCH = "SOLVER.IMS_PER_BATCH"


@dataclass(frozen=True)
class RecipeNoise:
    """The noise scale over a training of a recipe."""

    source: str  # the folder or file that it was read from
    recipe: Mapping[str, Any]  # by config key; its total batch is the recipe's own
    points: tuple[NoisePoint, ...] = ()  # none: it was not measured

    @property
    def max_iter(self) -> int:
        """Steps of the recipe."""
        return int(self.recipe["SOLVER.MAX_ITER"])

    @property
    def ims_per_batch(self) -> int:
        """Images in a step of the recipe."""
        return int(self.recipe[_IMS_PER_BATCH])

    @property
    def is_known(self) -> bool:
        """Whether it was measured until near the end of the training."""
        known = MOST_OF_A_TRAINING * self.max_iter
        return bool(self.points) and self.points[-1].recipe_steps >= known

    def refuse_other_recipe(self, other: RecipeNoise) -> None:
        """Raise a ConfigError that names the first key in which the recipes differ, if any."""
        for key, (own, others) in differences(self.recipe, other.recipe).items():
            if key == "SEED":
                continue
            advice = f"give trainings of one recipe: {other.source} is of another"
            raise ConfigError([Fault(key, others, f"{own!r}, as in {self.source}", advice)])

    def refuse_unmeasured(self, argument: str) -> None:
        """Raise a ConfigError, which names the command line's ``argument``, without noise."""
        if not self.points:
            allowed = "a training that has measured its noise"
            advice = (
                f"its {METRICS_FILE} has no noise_scale: train with --lr-rule gain, or with two "
                "parts in a step (GPUs, or micro-batches: D2SCALE.IMS_PER_GPU)"
            )
            raise ConfigError([Fault(argument, self.source, allowed, advice)])


@dataclass(frozen=True)
class Measurements:
    """What a run, or a few steps of a config, have measured."""

    noise: RecipeNoise
    candidates: tuple[Candidate, ...]  # batches with their speeds; none: no step was timed
    machine: Mapping[str, Any]  # machine.json, empty if there is none
    keeps_quality: bool  # its steps were the recipe's own, or followed the gain rule
    notes: tuple[str, ...] = ()  # for the reader


def recipe_to_compare(
    cfg: Any, source: str, *, changes: Mapping[str, Any] | None = None, ims_per_batch: int = 0
) -> RecipeNoise:
    """Return the recipe in ``cfg``, by which trainings are compared, without noise.

    Args:
        cfg: a config with d2scale's keys.
        source: how the user called it.
        changes: of a plan that it has already had: they are taken back.
        ims_per_batch: images in a step of the recipe; 0: as ``cfg`` says.

    Raises:
        ConfigError: with all faults of its schedule, or for an optimizer that is not SGD.
    """
    if faults := schedule_faults(cfg):
        raise ConfigError(faults)
    if not gain_is_proven_for(cfg.SOLVER.OPTIMIZER):
        allowed = "sgd: what the noise of a gradient says of larger batches is proven for SGD alone"
        advice = "scale an Adam-like optimizer with --lr-rule sqrt"
        raise ConfigError([Fault("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, allowed, advice)])
    recipe = recipe_of(cfg, changes)
    recipe[_IMS_PER_BATCH] = ims_per_batch or Schedule.from_cfg(cfg).recipe_ims_per_batch
    return RecipeNoise(source, recipe)


def read_noise(path: Path, argument: str) -> RecipeNoise:
    """Read the noise of a run's folder, or of a file that ``d2scale advise`` wrote as JSON.

    ConfigError, which may name the command line's ``argument``, if it has none.
    """
    noise = _of_advice(path) if path.is_file() else read_measurements(path, argument).noise
    noise.refuse_unmeasured(argument)
    return noise


def _of_advice(path: Path) -> RecipeNoise:
    content = read_json(path)
    try:
        points = [
            NoisePoint(_real(steps), math.inf if scale is None else _real(scale))
            for steps, scale in content["noise"]
        ]
        noise = RecipeNoise(str(path), {**content["recipe"]}, tuple(sorted(points)))
        if noise.max_iter < 1 or noise.ims_per_batch < 1:
            raise ValueError
    except (KeyError, TypeError, ValueError, OverflowError):
        raise _broken(path, "what d2scale advise --format json -o has written") from None
    return noise


def read_measurements(folder: Path, argument: str = "RUN") -> Measurements:
    """Read a run's folder; ConfigError with a line for what is missing or broken.

    ``argument`` is the command line's name for the folder.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        allowed = f"the folder of a run, with {METRICS_FILE}"
        raise ConfigError([Fault(argument, str(folder), allowed, "check the path")])
    config = str(folder / CONFIG_FILE)
    cfg, _ = load_recipe(config)
    plan = _read_plan(folder / PLAN_FILE)
    total = plan.get("ims_per_batch", cfg.SOLVER.IMS_PER_BATCH)
    recipe = recipe_to_compare(
        cfg,
        str(folder),
        changes=plan.get("changes"),
        ims_per_batch=round(total / plan["batch_ratio"]) if plan else 0,
    )
    # With the keys of the model's package too, which planning does not know.
    own = recipe_of(CfgNode(load_yaml(config)), plan.get("changes"))
    recipe = replace(recipe, recipe={**own, **recipe.recipe})
    lines = _read_lines(path, total)
    recipe = replace(recipe, points=_points(lines, recipe.ims_per_batch))
    by_gain = plan.get("lr_rule") == "gain"
    own_noise = recipe.points if by_gain and recipe.is_known else ()
    candidates = _candidates(lines, cfg, plan, total)
    return Measurements(
        recipe,
        tuple(replace(one, source=str(folder), noise=own_noise) for one in candidates),
        read_json(folder / MACHINE_FILE),
        keeps_quality=total == recipe.ims_per_batch or by_gain,
    )


def _read_plan(path: Path) -> dict[str, Any]:
    """Return ``plan.json``, empty if there is none."""
    plan = read_json(path)
    counts = (plan.get(name) for name in ("world_size", "ims_per_gpu", "ims_per_batch"))
    ratio, changes = plan.get("batch_ratio"), plan.get("changes")
    whole = all(is_whole(count) and int(count or 0) > 0 for count in counts)
    pairs = isinstance(changes, dict) and all(
        isinstance(pair, list) and len(pair) == 2 for pair in changes.values()
    )
    if plan and not (whole and is_number(ratio) and float(ratio or 0) > 0 and pairs):
        raise _broken(path, "the plan of a run, as d2scale writes it")
    return plan


class _Line(NamedTuple):
    """What a line of ``metrics.json`` says about training."""

    steps: float  # taken so far
    images_seen: float
    seconds: float  # of a step
    noise_scale: float | None  # images; None: not measured
    recipe_steps: float | None  # done, by the gain rule; None: without it


def _read_lines(path: Path, ims_per_batch: int) -> list[_Line]:
    """Read the lines about training; ``ims_per_batch`` tells images from steps if need be."""
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise _broken(path, f"a text file ({reason_of(error)})") from None
    lines = []
    for number, text in enumerate(texts, start=1):
        try:
            content = json.loads(text)
            if "time" in content:  # an evaluation has a line of its own
                lines.append(_line(content, ims_per_batch))
        except (ValueError, KeyError, TypeError, RecursionError):
            if number < len(texts):  # a kill may have cut the last one
                raise _broken(path, f"metrics as JSON in every line, as in {number}") from None
    return lines


def _line(content: Mapping[str, Any], ims_per_batch: int) -> _Line:
    """Return the values of a line; KeyError, TypeError or ValueError if it is broken."""
    steps = _real(content.get("steps", content["iteration"] + 1))
    noise_scale = content.get("noise_scale")
    if "noise_scale" in content:
        # JSON has no word for what is infinite; detectron2's writer takes Python's.
        noise_scale = math.inf if noise_scale in (None, math.inf) else _real(noise_scale)
    images = _real(content.get("images_seen", steps * ims_per_batch))
    seconds = _real(content["time"])
    if "gain" in content and "elapsed_seconds" not in content:
        # d2go's timer counts iterations of the recipe.
        seconds *= _real(content["gain"])
    done = _real(content["recipe_steps"]) if "recipe_steps" in content else None
    return _Line(steps, images, seconds, noise_scale, done)


def _real(value: Any) -> float:
    """Return a finite number that is not negative; ValueError for anything else."""
    if not is_number(value) or value < 0:
        raise ValueError(value)
    return float(value)


def _broken(path: Path, allowed: str) -> ConfigError:
    return ConfigError([Fault("file", str(path), allowed, "restore it, or take another")])


def _points(lines: Sequence[_Line], ims_per_batch: int) -> tuple[NoisePoint, ...]:
    places = (
        line.images_seen / ims_per_batch if line.recipe_steps is None else line.recipe_steps
        for line in lines
    )
    points = (
        NoisePoint(place, line.noise_scale)
        for place, line in zip(places, lines, strict=True)
        if line.noise_scale is not None
    )
    return tuple(sorted(points))


def setting_of(cfg: Any) -> str:
    """Return a config's precision, and activation checkpointing if it is on, in words."""
    checkpointing = cfg.D2SCALE.ACTIVATION_CHECKPOINTING
    return name_of_variant(variant({}, amp=cfg.SOLVER.AMP.ENABLED, checkpointing=checkpointing))


def _candidates(
    lines: Sequence[_Line], cfg: Any, plan: Mapping[str, Any], total: int
) -> tuple[Candidate, ...]:
    before = _Line(0, 0, 0, None, None)
    seconds = [
        line.seconds
        for last, line in pairwise([before, *lines])
        # Not those that a resumed run has taken with another batch.
        if line.seconds and line.images_seen - last.images_seen == total * (line.steps - last.steps)
    ]
    if not seconds:
        return ()
    fills = plan.get("method") == "max_memory" and not cfg.D2SCALE.MAX_IMS_PER_BATCH
    fills = fills and any(FIT_IN in str(note) for note in plan.get("notes", ()))
    batch = total, plan.get("world_size"), plan.get("ims_per_gpu"), setting_of(cfg)
    return (Candidate(*batch, total / statistics.median(seconds), fills_memory=fills),)
