"""Read checkpoint files safely; fall back to the one before if the last is broken."""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from d2scale.errors import CheckpointError, Fault, one_line
from d2scale.run_folder.contents import last_checkpoint
from d2scale.run_folder.files import CHECKPOINTS, LAST_CHECKPOINT, why_unreadable

logger = logging.getLogger(__name__)

_SHOWN_KEYS = 3
# Raised where content is used that has another type than what was written.
WRONG_KIND = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def last_whole_checkpoint(folder: Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the checkpoint that ``last_checkpoint`` names or, if it is broken, the one before.

    The one before is the whole one that has seen the most images. Broken ones are named in
    the log. Without ``last_checkpoint``, as after a kill at the first checkpoint, the search
    begins there.

    Returns the path and its content, None if the folder has no checkpoint at all. Raises
    CheckpointError if the one that is named is missing, or none is whole.
    """
    named = last_checkpoint(folder)
    broken: list[CheckpointError] = []
    candidates = [named] if named is not None else []
    candidates += [path for path in _by_images_seen(folder) if path != named]
    for path in candidates:
        try:
            content = read_checkpoint(path)
        except CheckpointError as error:
            if path == named and not path.exists():
                raise
            broken.append(error)
            continue
        for problem in broken:
            logger.warning("%s; going on from %s", problem, path.name)
        return path, content
    if broken:
        raise broken[0]
    if unreadable := sorted(folder.glob(CHECKPOINTS)):
        read_checkpoint(unreadable[-1])
    return None


def _by_images_seen(folder: Path) -> list[Path]:
    """Return the readable checkpoints of d2scale in ``folder``, the most advanced first."""
    readable = []
    for path in folder.glob(CHECKPOINTS):
        # Only a directory of the file's parts is read, not the weights.
        with suppress(Exception):
            content = torch.load(path, map_location="meta", mmap=True, weights_only=True)
            readable.append((int(content["images_seen"]), int(content["iteration"]), path))
    return [path for *_, path in sorted(readable, reverse=True)]


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a ``.pth`` file onto the CPU, with tensors and plain values only.

    Raises CheckpointError if it is missing, truncated, damaged, asks for other Python objects, or
    does not hold a dict with ``model``.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        advice = f"restore it, or write the name of another one into {LAST_CHECKPOINT}"
        raise _unreadable(path, "not there", advice) from error
    except Exception as error:  # torch.load raises many types for broken files
        advice = f"it is truncated or foreign; use another one ({why_unreadable(error)})"
        raise _unreadable(path, "unreadable", advice) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise _unreadable(path, "without a model", "use a checkpoint of a training")
    if part := _damaged_part(path):
        advice = f"its part {part} is not what was written; use another one, and check the disk"
        raise _unreadable(path, "damaged", advice)
    return content


def _damaged_part(path: Path) -> str | None:
    """Return the part of a checkpoint whose checksum is wrong, None if all are right.

    torch writes a zip archive with checksums, and does not look at them when it reads. Its format
    before torch 1.6 has none.
    """
    if not zipfile.is_zipfile(path):
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            # torch can be told to leave them out: then all are 0.
            return archive.testzip() if any(part.CRC for part in archive.infolist()) else None
    except Exception as error:  # a damaged directory of parts raises nearly any type
        return f"({type(error).__name__}: {one_line(error)})"


def _unreadable(path: Path, state: str, advice: str) -> CheckpointError:
    return CheckpointError([Fault(f"checkpoint {path}", state, "a whole checkpoint", advice)])


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Within the context, let what content of a wrong kind raises be a CheckpointError.

    ``what`` is the part of the file at ``path`` that is used there.
    """
    try:
        yield
    except WRONG_KIND as error:
        advice = f"use another checkpoint ({type(error).__name__}: {error})".replace("\n", " ")
        fault = Fault(f"{what} in {path}", "of another kind", f"a run's {what}", advice)
        raise CheckpointError([fault]) from error


def mismatches(path: Path, weights: Mapping[str, Any], expected: Mapping[str, Any]) -> list[Fault]:
    """Return how the ``weights`` in ``path`` differ from ``expected`` by name and shape."""
    lists = {
        "keys that the model lacks": [key for key in weights if key not in expected],
        "keys that it lacks": [key for key in expected if key not in weights],
        "values that are no weights": [
            key
            for key, value in expected.items()
            if key in weights and not fits(weights[key], value)
        ],
        "shapes that differ": [
            f"{key} {tuple(weights[key].shape)} for {tuple(value.shape)}"
            for key, value in expected.items()
            if key in weights and fits(weights[key], value) and weights[key].shape != value.shape
        ],
    }
    allowed, advice = "the weights of this model", "use the config that it was trained with"
    faults = []
    for difference, keys in lists.items():
        more = ", ..." if len(keys) > _SHOWN_KEYS else ""
        value = f"{len(keys)} {difference}: {', '.join(keys[:_SHOWN_KEYS])}{more}"
        if keys:
            faults.append(Fault(f"checkpoint {path}", value, allowed, advice))
    return faults


def fits(value: Any, expected: torch.Tensor) -> bool:
    """Return whether a value is a dense tensor that is loaded without changing its kind."""
    if not isinstance(value, torch.Tensor) or value.is_meta or value.layout != torch.strided:
        return False
    return value.is_floating_point() == expected.is_floating_point()
