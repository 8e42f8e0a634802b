"""The memory profile: bytes that training needs as a function of the images per GPU."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d2scale.errors import ConfigError, Fault

FORMAT = "d2scale memory profile"
VERSION = 1
GIB = 2**30


@dataclass(frozen=True)
class Phase:
    """One part of a training step. Its peak is ``static_bytes + m * bytes_per_image``."""

    name: str
    static_bytes: int
    bytes_per_image: int

    def peak_bytes(self, ims_per_gpu: int) -> int:
        """Return the most bytes that this phase holds with ``ims_per_gpu`` images."""
        return self.static_bytes + ims_per_gpu * self.bytes_per_image


@dataclass(frozen=True)
class MemoryProfile:
    """Bytes of device memory that one rank needs.

    The peak of a step is the largest peak of its phases. Forward and backward grow with the
    images; the optimizer step does not, and is the peak of a small model.

    Attributes:
        phases: at least one.
        source: ``predicted`` or ``measured``.
        description: what it covers: model, input size, precision, device.
    """

    phases: tuple[Phase, ...]
    source: str
    description: str = ""

    def peak_bytes(self, ims_per_gpu: int) -> int:
        """Return the most bytes that a training step holds with ``ims_per_gpu`` images."""
        return max(phase.peak_bytes(ims_per_gpu) for phase in self.phases)

    def largest_ims_per_gpu(self, budget_bytes: float) -> int:
        """Return the most images whose step stays within ``budget_bytes``; 0 if none does."""
        rooms = []
        for phase in self.phases:
            room = budget_bytes - phase.static_bytes
            if room < 0:
                return 0
            if phase.bytes_per_image:
                rooms.append(int(room // phase.bytes_per_image))
        return min(rooms)

    def to_json(self) -> dict[str, Any]:
        """Return the profile as it stands in a file."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "source": self.source,
            "description": self.description,
            "phases": [vars(phase) for phase in self.phases],
        }

    @classmethod
    def from_json(cls, content: Any, where: str) -> MemoryProfile:
        """Read a profile; ``where`` names it in faults.

        Raises:
            ConfigError: if it is not a profile, or its numbers cannot be.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise _fault(where, f'JSON with "format": "{FORMAT}"', "give a memory profile")
        if content.get("version") != VERSION:
            raise _fault(where, f"version {VERSION}", "make it anew with this d2scale")
        try:
            phases = tuple(Phase(**phase) for phase in content["phases"])
            profile = cls(phases, str(content["source"]), str(content.get("description", "")))
        except (KeyError, TypeError) as error:
            raise _fault(
                where,
                'a "source" and a list of "phases" with name, static_bytes, bytes_per_image',
                f"correct it ({error})",
            ) from error
        if not all(_is_sound(phase) for phase in phases) or not any(
            phase.bytes_per_image for phase in phases
        ):
            raise _fault(
                where,
                "whole numbers of bytes, 0 or more, and a phase that grows with the images",
                "correct it",
            )
        return profile


def _is_sound(phase: Phase) -> bool:
    return all(
        isinstance(count, int) and not isinstance(count, bool) and count >= 0
        for count in (phase.static_bytes, phase.bytes_per_image)
    )


def _fault(where: str, allowed: str, advice: str) -> ConfigError:
    return ConfigError([Fault("memory profile", where, allowed, advice)])


def load_profile(path: str) -> MemoryProfile:
    """Read a memory profile from a JSON file.

    Raises:
        ConfigError: if the file is missing, unreadable or not a profile.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise _fault(path, "a readable file", f"check the path ({error.strerror})") from error
    except ValueError as error:
        raise _fault(path, "JSON", f"mend it ({error})") from error
    return MemoryProfile.from_json(content, path)
