"""The last whole checkpoint of a detectron2 run; damaged and foreign ones refused in one line."""

from __future__ import annotations

import logging
import pickletools
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from d2scale.errors import CheckpointError, Fault
from d2scale.run_folder.contents import last_checkpoint
from d2scale.run_folder.files import (
    CHECKPOINTS,
    LAST_CHECKPOINT,
    why_unreadable,
    write_atomically,
)

logger = logging.getLogger(__name__)

# Raised where content is used that has another type than what was written.
_WRONG_KIND = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint that ``last_checkpoint`` names or, if it was cut short, another.

    That is the newest whole one. detectron2 writes its files in place, so a kill leaves parts of
    them. Without ``last_checkpoint``, as after a kill at the first checkpoint, the search begins
    there. Returns None if there is none; CheckpointError if the one that is named is missing, or
    none is whole.
    """
    named = last_checkpoint(folder)
    if named is not None and not named.exists():
        advice = f"restore it, or write the name of another one into {LAST_CHECKPOINT}"
        raise CheckpointError([Fault(f"checkpoint {named}", "not there", "a checkpoint", advice)])
    found = sorted(folder.glob(CHECKPOINTS), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for path in found if named is None else [named, *found]:
        if _is_whole(path):
            return path
    if (folder / LAST_CHECKPOINT).exists():
        advice = "it was cut short; start anew in another folder"
        value = str(named or folder)
        raise CheckpointError([Fault("last checkpoint", value, "a whole checkpoint", advice)])
    return None


def name_last_checkpoint(folder: Path) -> None:
    """Let ``last_checkpoint`` name the last whole checkpoint, where detectron2 looks for it."""
    path = last_whole_checkpoint(folder)
    if path is not None and path != last_checkpoint(folder):
        logger.warning("going on from %s, the last whole checkpoint", path)
        write_atomically(folder / LAST_CHECKPOINT, path.name)


def _is_whole(path: Path) -> bool:
    """Return whether a file is not cut short; what is no archive is not judged."""
    if path.is_dir():  # d2go writes the parts of a model that is sharded
        return True
    with path.open("rb") as file:
        start = file.read(2)
    return zipfile.is_zipfile(path) or start not in (b"", b"PK")


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Within the context, let a file that cannot be read be a CheckpointError."""
    try:
        yield
    except Exception as error:  # torch.load raises many types for broken files
        advice = f"it is truncated or foreign; use another one ({why_unreadable(error)})"
        fault = Fault(f"checkpoint {path}", "unreadable", "a whole checkpoint", advice)
        raise CheckpointError([fault]) from error


@contextmanager
def using(what: str) -> Iterator[None]:
    """Within the context, let content of ``what`` that has a wrong type be a CheckpointError."""
    try:
        yield
    except _WRONG_KIND as error:
        advice = f"use another checkpoint ({type(error).__name__}: {error})".replace("\n", " ")
        raise CheckpointError([Fault(what, "of another kind", "that of a run", advice)]) from error


def check_readable(path: Path) -> None:
    """Raise a CheckpointError for weights that detectron2 could not read. Nothing is run."""
    with reading(str(path)):
        if path.suffix == ".pkl":
            with path.open("rb") as file:
                for _ in pickletools.genops(file):
                    pass
        else:
            archive = zipfile.is_zipfile(path)
            torch.load(path, map_location="cpu", mmap=archive, weights_only=True)
