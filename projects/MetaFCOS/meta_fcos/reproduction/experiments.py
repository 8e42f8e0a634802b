"""The published experiments and one beside them: their recipes, and schedules at other lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from d2scale.errors import ConfigError, Fault
from d2scale.planning import rules

# Checkpoints of a training: enough to lose little to a kill, few enough to keep.
_CHECKPOINTS = 15
# Least rows of a training in metrics.json: the noise of its loss is estimated from them.
_REPORTS = 60


@dataclass(frozen=True)
class Experiment:
    """An experiment."""

    word: str  # that --only chooses it by
    title: str  # its name in tables
    gpus: int  # Quadro RTX 5000 that it was published on, or is written for
    time: str  # that it took there; empty if it was not published
    full: str  # name of its recipe
    small: str  # name of its recipe for a CPU

    @property
    def folder(self) -> str:
        """The name of its run folder."""
        return "experiment-" + self.title.replace(" ", "-")

    def recipe(self, form: str, third_method: str) -> str:
        """Return the address of its recipe in the form "full" or "small"."""
        # Experiment 3 in full is as "published", its rate and length set as if the batch had
        # doubled, or "exact", by its true ratio of 30/16. In small the batch doubles.
        name = self.full if form == "full" else self.small
        if self.word == "3" and form == "full" and third_method == "exact":
            name = "experiment-3-exact"
        return f"d2scale://MetaFCOS/{name}.yaml"


BASELINE = Experiment("1", "1 baseline", 2, "11:17:36", "experiment-1-baseline", "small-cpu")
SAME_BATCH = Experiment("2", "2 same batch", 1, "20:15:22", "experiment-2-same-batch", "small-cpu")
LARGE_BATCH = Experiment(
    "3", "3 large batch", 2, "9:49:10", "experiment-3-large-batch", "small-cpu-large-batch"
)
# The batch of experiment 3 by the gain rule, where the publication took the linear one.
GAIN = Experiment("gain", "3 large batch by gain", 2, "", "experiment-3-gain", "small-cpu-gain")
PUBLISHED: tuple[Experiment, ...] = (BASELINE, SAME_BATCH, LARGE_BATCH)
EXPERIMENTS: tuple[Experiment, ...] = (BASELINE, SAME_BATCH, GAIN, LARGE_BATCH)


def images_of(cfg: Any) -> int:
    """Return the images that a recipe's whole training shows."""
    return int(cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH)


def length_faults(images_seen: int, recipes: Sequence[Any]) -> list[Fault]:
    """Return what is wrong with cutting every one of ``recipes`` to ``images_seen``."""
    least = max(len(cfg.SOLVER.STEPS) * _most_ims_per_batch(cfg) + 1 for cfg in recipes)
    most = min(images_of(cfg) for cfg in recipes)
    if least <= images_seen <= most:
        return []
    allowed = f"{least} (a step for each learning rate) to {most} (the recipe's whole training)"
    return [Fault("--images-seen", images_seen, allowed, "choose a number between them")]


def _most_ims_per_batch(cfg: Any) -> int:
    """Return the images of a step, of those that max_memory chooses the most."""
    return int(cfg.D2SCALE.MAX_IMS_PER_BATCH or cfg.SOLVER.IMS_PER_BATCH)


def length_settings(cfg: Any, images_seen: int | None) -> dict[str, Any]:
    """Return the config keys that give a recipe another length, with its checkpoints and reports.

    Before, and cut to a third::

        SOLVER: {IMS_PER_BATCH: 16, MAX_ITER: 30000, STEPS: [20000, 25000], WARMUP_ITERS: 1000}
        SOLVER: {IMS_PER_BATCH: 16, MAX_ITER: 10000, STEPS: [6667, 8333], WARMUP_ITERS: 333}

    Warm-up and learning-rate drops keep their fraction of the training, so a cut training sees
    every learning rate; it is evaluated at its end only. ``images_seen`` is rounded up to a
    whole step; None keeps the recipe's length.
    """
    solver, settings = cfg.SOLVER, {}
    max_iter = solver.MAX_ITER
    if images_seen is not None:
        ratio = Fraction(images_of(cfg), images_seen)
        max_iter = rules.scale_max_iter(max_iter, ratio)
        settings = {
            "SOLVER.MAX_ITER": max_iter,
            "SOLVER.STEPS": rules.scale_steps(solver.STEPS, ratio, max_iter),
            "SOLVER.WARMUP_ITERS": rules.scale_count(solver.WARMUP_ITERS, ratio),
            "TEST.EVAL_PERIOD": 0,
        }
    return {
        **settings,
        "SOLVER.CHECKPOINT_PERIOD": -(-max_iter // _CHECKPOINTS),
        "WRITER_PERIOD": max(1, min(cfg.WRITER_PERIOD, max_iter // _REPORTS)),
    }


def chosen(only: str | None) -> tuple[Experiment, ...]:
    """Return the experiments of a list such as ``1,gain``, in their order; PUBLISHED for None."""
    if only is None:
        return PUBLISHED
    words = [word.strip() for word in only.split(",")]
    experiments = tuple(one for one in EXPERIMENTS if one.word in words)
    if len(experiments) < len(set(words)):
        allowed = "some of 1, 2, 3, gain, separated by commas"
        advice = "correct it, or leave it out for the published three"
        raise ConfigError([Fault("--only", only, allowed, advice)])
    return experiments
