"""The memory profile: bytes that training needs as a function of the images per GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from d2scale.errors import ConfigError, Fault
from d2scale.planning.gpu_assumptions import context_bytes

FORMAT = "d2scale memory profile"
VERSION = 2
# Version 1 has no averaging_bytes: DistributedDataParallel held the gradients a second time.
_READABLE = (1, 2)
GIB = 2**30
PREDICTED, MEASURED = _SOURCES = ("predicted", "measured")
_MOST_BYTES = 2**60  # more is a slip

# Phases in which the gradients of earlier micro-batches lie beside what is counted.
_ACCUMULATING = ("forward", "backward")


@dataclass(frozen=True)
class Phase:
    """One part of a training step. Its peak is ``static_bytes + m * bytes_per_image``."""

    name: str
    static_bytes: int
    bytes_per_image: int

    def peak_bytes(self, ims_per_gpu: float) -> int:
        """Return the most bytes that this phase holds with ``ims_per_gpu`` images."""
        return self.static_bytes + round(ims_per_gpu * self.bytes_per_image)


@dataclass(frozen=True)
class Point:
    """A step that was counted or measured."""

    ims_per_gpu: int
    live_bytes: int  # the most that tensors held at one moment
    reserved_bytes: int  # the most that the allocator took from the device
    needed_bytes: int | None = None  # the least that it can be given; None if it was not sought


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of device memory that one rank needs.

    The peak of a step is the largest peak of its phases. Forward and backward grow with the
    images; the optimizer step does not, and is the peak of a small model. A phase may have
    several lines, for its own peak moves as the images become more.
    """

    phases: tuple[Phase, ...]  # at least one; of one rank alone and one micro-batch a step
    source: str  # PREDICTED or MEASURED
    description: str = ""  # how it was made, and for what, in words
    context_bytes: int = 0  # what the device's runtime takes besides, before the first tensor
    gradient_bytes: int = 0  # of all gradients, which accumulation holds between micro-batches
    averaging_bytes: int = 0  # of the buffers in which several ranks average gradients
    # The settings that it holds for, as planning.coverage names them; empty: not known.
    covers: Mapping[str, Any] = field(default_factory=dict)
    points: tuple[Point, ...] = ()  # what it was made from

    def on_gpu(self, generation: int) -> MemoryProfile:
        """Return the profile with the context of a GPU of this generation, if it was predicted.

        ``generation`` is the first number of its compute capability; 0: none is at hand.
        """
        if self.source != PREDICTED or not self.context_bytes:
            return self
        return replace(self, context_bytes=context_bytes(generation))

    def part_to_fill(self, fraction: float) -> float:
        """Return the part of a budget that a plan may fill, ``fraction`` being a prediction's.

        Measuring fills a budget with the worst batches that there can be, and needs no margin.
        """
        return 1.0 if self.source == MEASURED else fraction

    def peak_bytes(
        self, ims_per_gpu: float, *, world_size: int = 1, accumulates: bool = False
    ) -> int:
        """Return the most bytes that a step takes; if it ``accumulates``, in micro-batches."""
        lines = self._lines(world_size, accumulates)
        return max(static + round(ims_per_gpu * slope) for static, slope in lines)

    def largest_ims_per_gpu(
        self, budget_bytes: float, *, world_size: int = 1, accumulates: bool = False
    ) -> int:
        """Return the most images whose step stays within ``budget_bytes``; 0 if none does."""
        rooms = []
        for static, slope in self._lines(world_size, accumulates):
            if budget_bytes < static:
                return 0
            if slope:
                rooms.append(int((budget_bytes - static) // slope))
        return min(rooms)

    def _lines(self, world_size: int, accumulates: bool) -> list[tuple[int, int]]:
        lines = []
        for phase in self.phases:
            static = self.context_bytes + phase.static_bytes
            static += self.averaging_bytes if world_size > 1 else 0
            static += self.gradient_bytes if accumulates and phase.name in _ACCUMULATING else 0
            lines.append((static, phase.bytes_per_image))
        return lines

    def to_json(self) -> dict[str, Any]:
        """Return the profile as it stands in a file."""
        return {"format": FORMAT, "version": VERSION, **asdict(self)}

    @classmethod
    def from_json(cls, content: Any, where: str) -> MemoryProfile:
        """Read a profile; ``where`` names it in the ConfigError if it is none."""
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise _fault(where, f'JSON with "format": "{FORMAT}"', "give a memory profile")
        if content.get("version") not in _READABLE:
            advice = f"it has version {content.get('version')!r}: make it anew with this d2scale"
            raise _fault(where, f"version {' or '.join(map(str, _READABLE))}", advice)
        gradient_bytes = content.get("gradient_bytes", 0)
        try:
            profile = cls(
                tuple(Phase(**phase) for phase in content["phases"]),
                str(content["source"]),
                str(content.get("description", "")),
                content.get("context_bytes", 0),
                gradient_bytes,
                content.get("averaging_bytes", gradient_bytes),
                dict(content.get("covers", {})),
                tuple(Point(**point) for point in content.get("points", ())),
            )
        except (KeyError, TypeError, ValueError) as error:
            allowed = 'a "source" and a list of "phases" with name, static_bytes, bytes_per_image'
            raise _fault(where, allowed, f"correct it ({error})") from error
        if profile.source not in _SOURCES:
            raise _fault(where, f'a "source" of {" or ".join(_SOURCES)}', "correct it")
        if not profile._is_sound():
            allowed = "whole numbers of bytes, 0 or more, and a phase that grows with the images"
            raise _fault(where, allowed, "correct it")
        return profile

    def _is_sound(self) -> bool:
        counts: list[Any] = [self.context_bytes, self.gradient_bytes, self.averaging_bytes]
        for phase in self.phases:
            counts += [phase.static_bytes, phase.bytes_per_image]
        for point in self.points:
            counts += [point.ims_per_gpu, point.live_bytes, point.reserved_bytes]
        whole = all(type(count) is int and 0 <= count < _MOST_BYTES for count in counts)
        return whole and any(phase.bytes_per_image > 0 for phase in self.phases)


def load_profiles(path: str) -> tuple[MemoryProfile, ...]:
    """Read the memory profiles of a JSON file: one, or a list. Other files are a ConfigError."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _fault(path, "a readable file", f"check the path ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise _fault(path, "JSON", f"mend it ({error})") from error
    if isinstance(content, list) and content:
        return tuple(MemoryProfile.from_json(entry, path) for entry in content)
    return (MemoryProfile.from_json(content, path),)


def dump_profiles(profiles: Sequence[MemoryProfile]) -> str:
    """Return the text of a file that :func:`load_profiles` reads."""
    content = [profile.to_json() for profile in profiles]
    return json.dumps(content[0] if len(content) == 1 else content, indent=1) + "\n"


def _fault(where: str, allowed: str, advice: str) -> ConfigError:
    return ConfigError([Fault("memory profile", where, allowed, advice)])
