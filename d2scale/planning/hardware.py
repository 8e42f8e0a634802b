"""What a recipe shall run on: ranks, device memory, and what training needs of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from d2scale.config.keys import get_key
from d2scale.errors import ConfigError, Fault
from d2scale.planning.coverage import (
    DEFAULT_ENGINE,
    choose_profile,
    coverage,
    find_profile,
    variant,
)
from d2scale.planning.memory_profile import GIB, MemoryProfile, load_profiles
from d2scale.planning.methods import method_of
from d2scale.planning.profile_tables import name_of_variant
from d2scale.planning.shipped import shipped_profiles

# Sides of padded images are multiples of it.
_SIZE_STEP = 32


@dataclass(frozen=True)
class Hardware:
    """What the recipe shall run on.

    Attributes:
        world_size: ranks, one to a GPU (N).
        budget_gib: device memory of one GPU in GiB that may be used, None if unknown.
        profile: what training needs of it, None if unknown.
        ims_per_gpu: images in one forward and backward of one GPU, 0 to decide.
        alternatives: profiles of the same recipe in float32 and with AMP, without and with
            activation checkpointing, as far as they are known; ``profile`` is one of them.
        short_edge: largest ``INPUT.MIN_SIZE_TRAIN`` in pixels, 0 if unknown.
        fraction: part of the budget that a prediction may fill.
    """

    world_size: int
    budget_gib: float | None = None
    profile: MemoryProfile | None = None
    ims_per_gpu: int = 0
    alternatives: tuple[MemoryProfile, ...] = ()
    short_edge: int = 0
    fraction: float = 1.0

    @classmethod
    def from_cfg(
        cls,
        cfg: Any,
        world_size: int,
        *,
        budget_gib: float | None = None,
        device_gib: float | None = None,
        profile: MemoryProfile | None = None,
        profile_path: str | None = None,
        ims_per_gpu: int | None = None,
        settings: Mapping[str, Any] | None = None,
        engine: str = DEFAULT_ENGINE,
    ) -> Hardware:
        """Combine what the caller says with the ``D2SCALE`` keys; the caller wins.

        Without a profile of the caller's, the one that comes with d2scale is taken, if there is
        one for this recipe.

        Args:
            cfg: a detectron2, d2go or d2scale config.
            world_size: ranks.
            budget_gib: device memory of one GPU to plan for; None: ``MEMORY.BUDGET_GIB``, or
                all of ``device_gib``.
            device_gib: what the device has, None if it is not at hand.
            profile: as measured or predicted for ``cfg``.
            profile_path: a file of profiles; None: ``MEMORY.PROFILE``.
            ims_per_gpu: None: ``IMS_PER_GPU``.
            settings: what the recipe sets that ``cfg`` may not know, by dotted key.
            engine: what trains it; a profile holds for one engine.

        Raises:
            ConfigError: for values out of range or a profile that cannot be read or belongs to
                another recipe.
        """
        if ims_per_gpu is None:
            ims_per_gpu = get_key(cfg, "D2SCALE.IMS_PER_GPU", 0)
        fraction = get_key(cfg, "D2SCALE.MEMORY.FRACTION", 1.0)
        configured = get_key(cfg, "D2SCALE.MEMORY.BUDGET_GIB", 0.0)
        asked = configured or None if budget_gib is None else budget_gib
        _check(
            ("number of GPUs", world_size, world_size >= 1, "1 or more"),
            ("D2SCALE.MEMORY.FRACTION", fraction, 0 < fraction <= 1, "above 0, at most 1"),
            ("D2SCALE.IMS_PER_GPU", ims_per_gpu, ims_per_gpu >= 0, "0 (decide) or more"),
            _budget_check(asked, device_gib),
        )
        budget = device_gib if asked is None else asked
        path = profile_path or get_key(cfg, "D2SCALE.MEMORY.PROFILE", "")
        known: Sequence[MemoryProfile] = ()
        if profile is None:
            covers = coverage(cfg, settings, engine)
            if path:
                known = load_profiles(path)
                profile = choose_profile(known, covers, path)
            else:
                known = shipped_profiles()
                profile = find_profile(known, covers)
        return cls(
            world_size,
            budget,
            profile,
            ims_per_gpu,
            _alternatives(known, profile),
            max(get_key(cfg, "INPUT.MIN_SIZE_TRAIN", (0,))),
            fraction,
        )

    @classmethod
    def for_training(
        cls,
        cfg: Any,
        world_size: int,
        *,
        method: str | None,
        device_gib: float | None,
        engine: str,
        make_profile: Callable[[], MemoryProfile] | None,
        make_variants: Callable[[], Sequence[MemoryProfile]] | None = None,
    ) -> Hardware:
        """Return the hardware of a run that begins now, with a profile where its plan needs one.

        ``max_memory`` without ``IMS_PER_GPU`` and ``MEMORY.PROFILE`` needs one: on a device it
        is measured, unless ``MEMORY.PROBE`` is False; otherwise a shipped one is taken, or else
        it is predicted.

        Args:
            cfg: a detectron2, d2go or d2scale config.
            world_size: ranks.
            method: one of ``METHODS``; None: the one that ``SOLVER.AUTO_SCALING_METHODS`` names.
            device_gib: memory of the GPU, None on a CPU.
            engine: what trains; a profile holds for one engine.
            make_profile: measures or predicts ``cfg``. Called only if the plan needs a profile,
                which is the same on all ranks that are given the same arguments. None: the run
                ends with other faults anyhow, so one image per GPU is planned instead.
            make_variants: profiles of the other precisions and of activation checkpointing, for
                advice. Called only if ``make_profile`` leaves no room for one image.

        Raises:
            ConfigError: see :meth:`from_cfg`; and what the two functions raise.
        """
        hardware = cls.from_cfg(cfg, world_size, device_gib=device_gib, engine=engine)
        if (method or method_of(cfg.SOLVER.AUTO_SCALING_METHODS)) != "max_memory":
            return hardware
        memory = cfg.D2SCALE.MEMORY
        if hardware.ims_per_gpu or memory.PROFILE or hardware.budget_gib is None:
            return hardware
        measures = device_gib is not None and memory.PROBE
        if hardware.profile is not None and not measures:
            return hardware
        if make_profile is None:
            return replace(hardware, ims_per_gpu=1)
        hardware = replace(hardware, profile=make_profile(), alternatives=())
        if make_variants is None or hardware.holds_one_image():
            return hardware
        return replace(hardware, alternatives=tuple(make_variants()))

    @property
    def room_gib(self) -> float | None:
        """What a plan may fill: all of the budget if it was measured, else ``fraction`` of it."""
        if self.budget_gib is None or self.profile is None:
            return self.budget_gib
        return self.budget_gib * self.profile.share_to_fill(self.fraction)

    def largest_fit(self, *, accumulates: bool = False) -> int | None:
        """Return the most images per GPU that fit, None if that cannot be said.

        Args:
            accumulates: whether a step has several micro-batches.

        Raises:
            ConfigError: if not even one image fits.
        """
        if self.ims_per_gpu:
            return self.ims_per_gpu
        if self.profile is None or self.room_gib is None:
            return None
        largest = self.profile.largest_ims_per_gpu(
            self.room_gib * GIB, world_size=self.world_size, accumulates=accumulates
        )
        if largest == 0:
            raise ConfigError([self._nothing_fits()])
        return largest

    def holds_one_image(self) -> bool:
        """Tell whether one image per GPU fits; there must be a profile and a budget."""
        assert self.profile is not None
        assert self.room_gib is not None
        return self._peak(self.profile, 1) <= self.room_gib * GIB

    def peak_gib(self, ims_per_gpu: int, *, accumulates: bool) -> float | None:
        """Return the device memory of one rank's step in GiB, None if unknown."""
        if self.profile is None:
            return None
        return self._peak(self.profile, ims_per_gpu, accumulates) / GIB

    def _peak(self, profile: MemoryProfile, ims_per_gpu: float, accumulates: bool = False) -> int:
        return profile.peak_bytes(ims_per_gpu, world_size=self.world_size, accumulates=accumulates)

    def _nothing_fits(self) -> Fault:
        """Say by how much one image is too large, and what would make it fit."""
        assert self.profile is not None
        assert self.budget_gib is not None
        share = self.profile.share_to_fill(self.fraction)
        image_gib = self._peak(self.profile, 1) / GIB
        needed_gib = image_gib / share
        allowed = f"at least the {image_gib:.2f} GiB of one image"
        if share < 1:
            allowed = (
                f"at least {needed_gib:.2f}, for D2SCALE.MEMORY.FRACTION of it, {share:g}, has to "
                f"hold the {image_gib:.2f} GiB of one image"
            )
        return Fault(
            "D2SCALE.MEMORY.BUDGET_GIB",
            round(self.budget_gib, 2),
            allowed,
            f"{needed_gib - self.budget_gib:.2f} GiB are missing; {self._ways_to_fit()}",
        )

    def _ways_to_fit(self) -> str:
        """Say which other choice would make one image fit."""
        others = [replace(self, profile=other) for other in self.alternatives]
        ways = [
            f"{name_of_variant(other.profile)} ({other._peak(other.profile, 1) / GIB:.2f} GiB)"
            for other in others
            if other.profile is not None and other.holds_one_image()
        ]
        smaller = self._smaller_short_edge()
        if smaller:
            ways.append(f"INPUT.MIN_SIZE_TRAIN of about {smaller}, MAX_SIZE_TRAIN in proportion")
        if ways:
            return "what would fit: " + ", or ".join(ways)
        if self.alternatives:
            return "no precision, activation checkpointing or INPUT size would make it fit"
        return (
            "try SOLVER.AMP.ENABLED or D2SCALE.ACTIVATION_CHECKPOINTING, and give that "
            "configuration's profile"
        )

    def _smaller_short_edge(self) -> int:
        """The short edge at which one image fits, its bytes going with its area; 0: none."""
        assert self.profile is not None
        assert self.room_gib is not None
        for edge in range(self.short_edge - _SIZE_STEP, _SIZE_STEP, -_SIZE_STEP):
            area = math.pow(edge / self.short_edge, 2)
            if self._peak(self.profile, area) <= self.room_gib * GIB:
                return edge // _SIZE_STEP * _SIZE_STEP
        return 0


def _alternatives(
    known: Sequence[MemoryProfile], profile: MemoryProfile | None
) -> tuple[MemoryProfile, ...]:
    if profile is None or not profile.covers:
        return ()
    choices = product((False, True), repeat=2)
    wanted = (variant(profile.covers, amp=a, checkpointing=c) for a, c in choices)
    found = (find_profile(known, covers) for covers in wanted)
    return tuple(each for each in found if each is not None)


def _budget_check(asked: float | None, device_gib: float | None) -> tuple[str, object, bool, str]:
    most = math.inf if device_gib is None else device_gib
    allowed = "above 0 GiB"
    if device_gib is not None:
        allowed += f", at most the {device_gib:.2f} GiB of the device"
    return (
        "D2SCALE.MEMORY.BUDGET_GIB",
        asked,
        asked is None or _positive_up_to(asked, most),
        allowed,
    )


def _positive_up_to(asked: float, most: float) -> bool:
    return math.isfinite(asked) and 0 < asked <= most


def _check(*checks: tuple[str, object, bool, str]) -> None:
    faults = [
        Fault(key, value, allowed, "correct it") for key, value, ok, allowed in checks if not ok
    ]
    if faults:
        raise ConfigError(faults)
