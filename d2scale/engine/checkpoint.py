"""Checkpoints that a kill cannot spoil, and their way back into a run."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

import torch
from fvcore.common.checkpoint import Checkpointer
from iopath.common.file_io import PathManager
from torch import nn

from d2scale.errors import CheckpointError, Fault

logger = logging.getLogger(__name__)

# Raised when an older d2scale can no longer read what this one writes.
FORMAT = 1
LAST_CHECKPOINT = "last_checkpoint"
RECORD = "d2scale"
# Beside weights and state, where the training stood.
POSITION = ("iteration", "images_seen", "sampler")
_SHOWN_KEYS = 3


class RunCheckpointer(Checkpointer):
    """fvcore's checkpointer with atomic writes and strict, safe reads.

    A file holds what fvcore writes (``model``, each checkpointable by its name, ``iteration``)
    and, under ``d2scale``, the format's number and the facts of the run.

    Args:
        model: bare or wrapped in DistributedDataParallel.
        save_dir: the run's folder.
        facts: plain values to keep with every checkpoint, such as the total batch; the
            attribute ``facts`` may be changed later.
        save_to_disk: False on all ranks but the first.
        checkpointables: objects with ``state_dict`` and ``load_state_dict``.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str,
        *,
        facts: Mapping[str, Any] | None = None,
        save_to_disk: bool = True,
        **checkpointables: Any,
    ) -> None:
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        # Without fvcore's handler for addresses: nothing is ever fetched from the network.
        self.path_manager = PathManager()
        self.facts = dict(facts or {})

    def save(self, name: str, **kwargs: Any) -> None:
        """Write ``name``.pth whole or not at all, then make it the last checkpoint.

        Raises:
            CheckpointError: if the folder cannot be written or is full.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data: dict[str, Any] = {"model": self.model.state_dict()}
        data.update({key: each.state_dict() for key, each in self.checkpointables.items()})
        data[RECORD] = {"format": FORMAT, **self.facts}
        data.update(kwargs)
        path = Path(self.save_dir) / f"{name}.pth"
        logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint, whole or not at all."""
        content = last_filename_basename.encode()
        write_atomically(Path(self.save_dir) / LAST_CHECKPOINT, lambda file: file.write(content))

    def resume(self) -> dict[str, Any] | None:
        """Load the last checkpoint into the model and all checkpointables.

        Returns:
            What else it holds: ``iteration``, the last one that was finished, ``images_seen``,
            ``sampler`` and the record ``d2scale``; None if the folder has no checkpoint.

        Raises:
            CheckpointError: if it is missing, truncated, of a newer format, or not of this run.
        """
        if not self.has_checkpoint():
            return None
        path = Path(self.get_checkpoint_file())
        logger.info("Resuming from %s", path)
        content = read_checkpoint(path)
        faults = _record_faults(path, content, [*self.checkpointables, *POSITION])
        if not faults:
            faults = mismatches(path, content["model"], self.model.state_dict())
        if faults:
            raise CheckpointError(faults)
        self.model.load_state_dict(content.pop("model"))
        for key, each in self.checkpointables.items():
            try:
                each.load_state_dict(content.pop(key))
            except (ValueError, KeyError) as error:
                advice = f"resume with the recipe that the run was started with ({error})"
                fault = Fault(f"{key} in {path}", "other state", f"this run's {key}", advice)
                raise CheckpointError([fault]) from error
        return content


def write_atomically(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file under a temporary name, bring it to the disk, and only then rename it.

    Raises:
        CheckpointError: if the system refuses.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError of its zip writer.
        with suppress(OSError):
            partial.unlink()
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        fault = Fault("checkpoint", str(path), "a file that can be written", f"check it: {reason}")
        raise CheckpointError([fault]) from error


def _sync_folder(folder: Path) -> None:
    """Bring a rename to the disk, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Read a ``.pth`` file onto the CPU, with tensors and plain values only.

    Raises:
        CheckpointError: if it is missing, truncated, asks for other Python objects, or does
            not hold a dict with ``model``.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        advice = f"restore it, or write the name of another one into {LAST_CHECKPOINT}"
        raise _unreadable(path, "not there", advice) from error
    except Exception as error:  # torch.load raises many types for broken files
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        advice = f"it is truncated or foreign; use another one ({reason})"
        raise _unreadable(path, "unreadable", advice) from error
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise _unreadable(path, "without a model", "use a checkpoint of a training")
    return content


def _unreadable(path: Path, found: str, advice: str) -> CheckpointError:
    return CheckpointError([Fault(f"checkpoint {path}", found, "a whole checkpoint", advice)])


def _record_faults(path: Path, content: Mapping[str, Any], needed: list[str]) -> list[Fault]:
    record = content.get(RECORD)
    absent = [key for key in needed if key not in content]
    if not isinstance(record, dict) or absent:
        what = "its record" if not absent else ", ".join(absent)
        return [
            Fault(
                f"checkpoint {path}",
                f"without {what}",
                "a checkpoint of d2scale's default engine, with the state of its training",
                "to start a new training from its weights, set MODEL.WEIGHTS to it",
            )
        ]
    if record.get("format", 0) > FORMAT:
        return [
            Fault(
                f"format of checkpoint {path}",
                record["format"],
                f"at most {FORMAT}",
                "update d2scale",
            )
        ]
    return []


def mismatches(path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> list[Fault]:
    """Return how the weights ``found`` in ``path`` differ by name and shape from ``expected``."""
    lists = {
        "keys that the model lacks": [key for key in found if key not in expected],
        "keys that it lacks": [key for key in expected if key not in found],
        "shapes that differ": [
            f"{key} {tuple(found[key].shape)} for {tuple(expected[key].shape)}"
            for key in expected
            if key in found and found[key].shape != expected[key].shape
        ],
    }
    return [
        Fault(
            f"checkpoint {path}",
            f"{len(keys)} {what}: {', '.join(keys[:_SHOWN_KEYS])}"
            f"{', ...' if len(keys) > _SHOWN_KEYS else ''}",
            "the weights of this model",
            "use the config that it was trained with",
        )
        for what, keys in lists.items()
        if keys
    ]
