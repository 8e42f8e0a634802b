"""The hardware to plan for: ranks, device memory, and the memory that training needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2scale.config.keys import get_key
from d2scale.config.value_rules import (
    LONGEST_EDGE,
    MOST_IMAGES,
    Rule,
    is_number,
    is_whole,
    judge,
    number,
    whole,
)
from d2scale.errors import ConfigError, Fault
from d2scale.planning.coverage import (
    DEFAULT_ENGINE,
    choose_profile,
    coverage,
    find_profile,
    find_variants,
    name_of_variant,
    shipped_profiles,
)
from d2scale.planning.memory_profile import GIB, MemoryProfile, load_profiles
from d2scale.planning.methods import method_of

# Sides of padded images are multiples of it.
_SIZE_STEP = 32

BUDGET, PROFILE = "D2SCALE.MEMORY.BUDGET_GIB", "D2SCALE.MEMORY.PROFILE"
IMS_PER_GPU = "D2SCALE.IMS_PER_GPU"
FRACTION = number("D2SCALE.MEMORY.FRACTION", above=0, most=1)
SHORT_EDGES = Rule(
    "INPUT.MIN_SIZE_TRAIN",
    f"one or more whole numbers of pixels up to {LONGEST_EDGE}, 0 for no resizing",
    lambda edges: (
        bool(edges) and all(is_whole(edge) and 0 <= edge <= LONGEST_EDGE for edge in edges)
    ),
)


def budget_rule(device_gib: float | None) -> Rule:
    """Return the rule of ``D2SCALE.MEMORY.BUDGET_GIB`` on a device of ``device_gib``, if any."""
    most, allowed = math.inf, "above 0 GiB"
    if device_gib is not None:
        most, allowed = device_gib, f"{allowed}, at most the {device_gib:.2f} GiB of the device"
    return Rule(BUDGET, allowed, lambda gib: is_number(gib) and 0 < gib <= most)


@dataclass(frozen=True)
class Hardware:
    """The ranks and the device memory to plan for."""

    world_size: int  # ranks, one to a GPU (N)
    budget_gib: float | None = None  # memory of one GPU that may be used, None if unknown
    profile: MemoryProfile | None = None  # what training needs of it, None if unknown
    ims_per_gpu: int = 0  # images in one forward and backward of one GPU, 0 to decide
    # Known profiles of the same recipe in float32 and with AMP, without and with activation
    # checkpointing; ``profile`` is one of them.
    variants: tuple[MemoryProfile, ...] = ()
    short_edge: int = 0  # largest INPUT.MIN_SIZE_TRAIN in pixels, 0 if unknown
    fraction: float = 1.0  # part of the budget that a prediction may fill

    @classmethod
    def from_cfg(
        cls,
        cfg: Any,
        world_size: int,
        *,
        budget_gib: float | None = None,
        device_gib: float | None = None,
        profile_path: str | None = None,
        ims_per_gpu: int | None = None,
        settings: Mapping[str, Any] | None = None,
        engine: str | None = DEFAULT_ENGINE,
    ) -> Hardware:
        """Read the ``D2SCALE`` keys; what the caller gives wins over them.

        Args:
            budget_gib, profile_path, ims_per_gpu: None takes the key of that name.
            device_gib: memory of the GPU at hand, which is the budget if none is asked for.
            settings: what the recipe sets that ``cfg`` may not know, by dotted key.
            engine: what trains it; a profile holds for one engine. None: any.

        Raises a ConfigError for values out of range, or a profile that cannot be used.
        """
        if ims_per_gpu is None:
            ims_per_gpu = get_key(cfg, IMS_PER_GPU, 0)
        if budget_gib is None:
            budget_gib = get_key(cfg, BUDGET, 0.0) or device_gib
        _check(cfg, world_size, ims_per_gpu, budget_gib, budget_rule(device_gib))
        covers = coverage(cfg, settings, engine)
        path = profile_path or get_key(cfg, PROFILE, "")
        known = load_profiles(path) if path else shipped_profiles()
        profile = choose_profile(known, covers, path) if path else find_profile(known, covers)
        return cls(
            world_size,
            budget_gib,
            profile,
            ims_per_gpu,
            variants=find_variants(known, profile),
            short_edge=max(get_key(cfg, SHORT_EDGES.key, (0,))),
            fraction=get_key(cfg, FRACTION.key, 1.0),
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
        generation: int = 0,
    ) -> Hardware:
        """Return the hardware of a run that starts now, with a profile if its plan needs one.

        ``max_memory`` without ``IMS_PER_GPU`` and ``MEMORY.PROFILE`` needs one. On a GPU it is
        made, unless ``MEMORY.PROBE`` is False; otherwise only if no shipped one fits.

        Args:
            method: one of ``METHODS``; None: the one that ``SOLVER.AUTO_SCALING_METHODS`` names.
            make_profile: measures or predicts ``cfg``; called on all ranks that get the same
                arguments or on none. None: two images per GPU are planned, for a run that ends
                with other faults anyhow.
            make_variants: profiles of other precisions and of activation checkpointing, for
                advice; called only if ``make_profile`` leaves no room for one image.
            generation: of the GPU at hand; see :meth:`MemoryProfile.on_gpu`.

        Raises:
            ConfigError: as :meth:`from_cfg`, and what the two functions raise.
        """
        hardware = cls.from_cfg(cfg, world_size, device_gib=device_gib, engine=engine)
        if hardware.profile:
            hardware = replace(hardware, profile=hardware.profile.on_gpu(generation))
        if not hardware._needs_profile(cfg, method, on_gpu=device_gib is not None):
            return hardware
        if make_profile is None:
            return replace(hardware, ims_per_gpu=2)  # one has no noise for the gain rule
        hardware = replace(hardware, profile=make_profile().on_gpu(generation), variants=())
        if make_variants is None or hardware.holds_one_image():
            return hardware
        return replace(hardware, variants=tuple(make_variants()))

    def _needs_profile(self, cfg: Any, method: str | None, *, on_gpu: bool) -> bool:
        if method is None:
            method = method_of(cfg.SOLVER.AUTO_SCALING_METHODS)
        if method != "max_memory" or self.ims_per_gpu or self.budget_gib is None:
            return False
        memory = cfg.D2SCALE.MEMORY
        return not memory.PROFILE and (self.profile is None or (on_gpu and memory.PROBE))

    @property
    def unknown(self) -> list[str]:
        """What is missing to plan the memory, the keys that give it, and options for a plan."""
        missing = []
        if self.budget_gib is None:
            missing.append("the memory of the GPU (D2SCALE.MEMORY.BUDGET_GIB or --gpu-memory-gib)")
        if self.profile is None:
            missing.append("a memory profile (D2SCALE.MEMORY.PROFILE or --profile)")
        return missing

    @property
    def room_gib(self) -> float | None:
        """Memory that a plan may fill: the budget, or ``fraction`` of it for a prediction."""
        if self.budget_gib is None or self.profile is None:
            return self.budget_gib
        return self.budget_gib * self.profile.part_to_fill(self.fraction)

    def largest_fit(self, *, accumulates: bool = False) -> int | None:
        """Return the most images per GPU that fit, None if that cannot be said.

        Raises a ConfigError if not even one image fits.
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
        """Return whether one image per GPU fits; there must be a profile and a budget."""
        assert self.room_gib is not None
        return self._peak(1) <= self.room_gib * GIB

    def peak_gib(self, ims_per_gpu: int, *, accumulates: bool) -> float | None:
        """Return the device memory of one rank's step in GiB, None if unknown."""
        return None if self.profile is None else self._peak(ims_per_gpu, accumulates) / GIB

    def _peak(self, ims_per_gpu: float, accumulates: bool = False) -> int:
        assert self.profile is not None
        return self.profile.peak_bytes(
            ims_per_gpu, world_size=self.world_size, accumulates=accumulates
        )

    def _nothing_fits(self) -> Fault:
        """Return the fault of a GPU too small for one image, with what would make it fit."""
        assert self.profile is not None
        assert self.budget_gib is not None
        part = self.profile.part_to_fill(self.fraction)
        needed_gib = self._peak(1) / GIB / part
        allowed = f"at least the {needed_gib:.2f} GiB of one image"
        if part < 1:
            allowed = (
                f"at least {needed_gib:.2f}, for {FRACTION.key} of it, {part:g}, has to "
                f"hold the {needed_gib * part:.2f} GiB of one image"
            )
        advice = f"{needed_gib - self.budget_gib:.2f} GiB are missing; {self._ways_to_fit()}"
        return Fault(BUDGET, round(self.budget_gib, 2), allowed, advice)

    def _ways_to_fit(self) -> str:
        """Return advice: the variants and the image size with which one image fits."""
        ways = [
            f"{name_of_variant(variant.covers)} ({other._peak(1) / GIB:.2f} GiB)"
            for variant in self.variants
            if (other := replace(self, profile=variant)).holds_one_image()
        ]
        if smaller := self._smaller_short_edge():
            ways.append(f"INPUT.MIN_SIZE_TRAIN of about {smaller}, MAX_SIZE_TRAIN in proportion")
        if ways:
            return "what would fit: " + ", or ".join(ways)
        if self.variants:
            return "no precision, activation checkpointing or INPUT size would make it fit"
        return (
            "try SOLVER.AMP.ENABLED, or activation checkpointing "
            "(D2SCALE.ACTIVATION_CHECKPOINTING in the default engine, MODEL.MODELING_HOOKS in "
            "d2go), and give that configuration's profile"
        )

    def _smaller_short_edge(self) -> int:
        """Return the short edge at which one image fits, if bytes go with its area; 0: none."""
        assert self.room_gib is not None
        for edge in range(self.short_edge - _SIZE_STEP, _SIZE_STEP, -_SIZE_STEP):
            if self._peak((edge / self.short_edge) ** 2) <= self.room_gib * GIB:
                return edge // _SIZE_STEP * _SIZE_STEP
        return 0


def _check(
    cfg: Any, world_size: int, ims_per_gpu: int, budget_gib: float | None, budget: Rule
) -> None:
    faults = whole("number of GPUs", 1, MOST_IMAGES).faults(world_size)
    faults += whole(IMS_PER_GPU, 0, MOST_IMAGES, advice="set it to 0 to have it decided").faults(
        ims_per_gpu
    )
    faults += judge(cfg, (FRACTION, SHORT_EDGES))
    if budget_gib is not None:
        faults += budget.faults(budget_gib)
    if faults:
        raise ConfigError(faults)
