"""Decide whether GPUs run the recipe's ranks in turn, as virtual ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from d2scale.config.keys import get_key
from d2scale.config.loading import flatten
from d2scale.config.projects import entry_points
from d2scale.config.value_rules import one_of
from d2scale.errors import ConfigError, Fault
from d2scale.planning.rules import VIRTUAL_RANKS, own_virtual_ranks
from d2scale.planning.schedule import Schedule
from d2scale.planning.sync_bn import SYNC_BN

VIRTUAL_RANKS_RULE = one_of(VIRTUAL_RANKS, ("auto", "on", "off"))
# What recipes of detectron2 and d2go call it, and LazyConfigs by its class.
_SYNCHRONISED_NORMS = (
    *("SyncBN", "nnSyncBN", "naiveSyncBN", "naiveSyncBN_N", "NaiveSyncBN"),
    *("SyncBatchNorm", "NaiveSyncBatchNorm", "sync_bn", "naive_sync_bn"),
)
SYNCHRONISED = "synchronised batch norm"
# Batch norm that trains, in the same places.
_BATCH_NORMS = ("BN", "bn", "BatchNorm2d")
# Defaults of d2go that say nothing unless the backbone's name has this in it.
_NORMS_OF_BACKBONES = {"MODEL.FBNET_V2.NORM": "fbnet", "MODEL.VT_FPN.NORM": "vt"}
# Models of the default engine, by name.
MODELS = "d2scale.models"


@dataclass(frozen=True)
class ModelFacts:
    """What decides how the steps of a model can be split."""

    # It tells the divisors of its losses, so that any split of a step is exact.
    tells_normalizers: bool = False
    # Why the recipe's ranks cannot be run in turn, in words that follow "with"; empty: they can.
    obstacle: str = ""
    # It trains batch norm that is not synchronised.
    batch_norm: bool = False

    @classmethod
    def of_recipe(cls, cfg: Any, settings: Mapping[str, Any] | None = None) -> ModelFacts:
        """Return what is known before a model is built: a project's own tells its normalizers.

        ``settings`` are what the recipe sets that ``cfg`` may not know, by dotted key.
        """
        name = get_key(cfg, "MODEL.META_ARCHITECTURE", "")
        tells = any(entry.name == name for entry in entry_points(group=MODELS))
        values = {**dict(flatten(cfg)), **(settings or {})}
        backbone = str(values.get("MODEL.BACKBONE.NAME", "")).lower()
        norms = {
            value.rpartition(".")[2]
            for key, value in values.items()
            if isinstance(value, str) and _NORMS_OF_BACKBONES.get(key, "") in backbone
        }
        synchronised = not norms.isdisjoint(_SYNCHRONISED_NORMS)
        plain = not norms.isdisjoint(_BATCH_NORMS)
        return cls(tells, SYNCHRONISED if synchronised else "", plain)


def choose_virtual_ranks(
    cfg: Any, method: str, schedule: Schedule, world_size: int, model: ModelFacts
) -> tuple[int, tuple[str, ...]]:
    """Return how many virtual ranks a step has, 0 for none, and the reasons worth telling.

    ``auto`` takes them with ``keep_total``, for a model that does not tell its loss normalizers.

    Raises:
        ConfigError: if they are asked for and cannot be had.
    """
    asked = get_key(cfg, VIRTUAL_RANKS, "auto")
    auto = asked == "auto"
    if asked == "off" or (auto and (method != "keep_total" or model.tells_normalizers)):
        return 0, ()
    count = world_size if method == "per_gpu" else schedule.reference_world_size
    fault = _obstacle(cfg, method, schedule, world_size, model)
    if fault is None:
        return (0 if auto and count == 1 else count), ()
    allowed, advice = fault
    if auto:
        return 0, (f"no virtual ranks {allowed}: a step is approximately the recipe's; {advice}",)
    raise ConfigError([Fault(VIRTUAL_RANKS, asked, f"auto or off {allowed}", advice)])


def refuse_without_steps(cfg: Any) -> None:
    """Raise a ConfigError where virtual ranks are asked for and d2scale takes no steps."""
    if get_key(cfg, VIRTUAL_RANKS, "auto") == "on":
        allowed = "auto or off where d2scale does not take the optimizer steps"
        advice = "train with d2scale train, or without what keeps its own step"
        raise ConfigError([Fault(VIRTUAL_RANKS, "on", allowed, advice)])


def refuse_split_share(cfg: Any, model: ModelFacts, ims_per_gpu: int, share: int) -> None:
    """Raise a ConfigError where a GPU's share must be one forward of a model and is not.

    ``off`` accepts that as well, and so does batch norm that is not to be synchronised.
    """
    accepts = "off" in (get_key(cfg, VIRTUAL_RANKS, "auto"), get_key(cfg, SYNC_BN, "auto"))
    if not model.obstacle or ims_per_gpu >= share or accepts:
        return
    allowed = f"{share}, the share of a GPU in one forward, with {model.obstacle}"
    advice = f"use more GPUs or smaller images; {VIRTUAL_RANKS} off trains it approximately"
    raise ConfigError([Fault("images per GPU", ims_per_gpu, allowed, advice)])


def _obstacle(
    cfg: Any, method: str, schedule: Schedule, world_size: int, model: ModelFacts
) -> tuple[str, str] | None:
    """Return where there are no virtual ranks, and what to do; None: there can be."""
    count, images = schedule.reference_world_size, schedule.ims_per_batch
    if get_key(cfg, SYNC_BN, "auto") == "on" and model.batch_norm and world_size > 1:
        return f"with {SYNC_BN} on", f"{SYNC_BN} auto keeps the recipe's own batch norm"
    if model.obstacle:
        return f"with {model.obstacle}", "a GPU takes its share of a step in one forward instead"
    if method == "max_memory":
        return "with the method max_memory", "take keep_total"
    if world_size > count and method == "keep_total":
        return f"on {world_size} GPUs for a recipe of {count}", f"use at most {count} GPUs"
    if images % count:
        advice = "set SOLVER.REFERENCE_WORLD_SIZE to the recipe's GPUs"
        return f"with {images} images on {count} GPUs, which is no whole number each", advice
    if get_key(cfg, "D2SCALE.ACCUMULATION_STEPS", 0):
        return "with D2SCALE.ACCUMULATION_STEPS", "set that to 0"
    return None


def virtual_rank_notes(
    count: int, world_size: int, ims_per_batch: int, ims_per_gpu: int, largest: int | None
) -> Sequence[str]:
    """Return what a user should know of the virtual ranks of a plan.

    ``largest`` is the most images per GPU that fit, None if that is not known.
    """
    images = ims_per_batch // count
    shares = sorted({len(own_virtual_ranks(count, rank, world_size)) for rank in range(world_size)})
    turns = " or ".join(map(str, shares))
    notes = [
        f"virtual ranks: each GPU runs {turns} of the recipe's {count} ranks in turn, {images} "
        "images each with random numbers, statistics and loss normalizers of their own, so that "
        "the training is the recipe's"
    ]
    if ims_per_gpu < images:
        notes.append(
            f"a virtual rank's {images} images do not fit: in micro-batches of {ims_per_gpu} they "
            "are approximately the recipe's, unless the model tells its loss normalizers"
        )
    elif largest is not None and largest > images and shares[-1] > 1:
        notes.append(
            f"{VIRTUAL_RANKS} off would take up to {min(largest, shares[-1] * images)} images in "
            "one forward, which is faster where a GPU is not busy with small images, and not "
            "exactly the recipe's training"
        )
    return notes
