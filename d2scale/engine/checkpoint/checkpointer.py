"""Checkpoints that a kill cannot spoil, and their way back into a run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from fvcore.common.checkpoint import Checkpointer
from iopath.common.file_io import PathManager
from torch import nn

from d2scale.engine.checkpoint.files import last_whole_checkpoint
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.progress import FORMAT, RECORD
from d2scale.run_folder.files import LAST_CHECKPOINT, Content, write_atomically
from d2scale.step.optimizer_state import load_optimizer_state

logger = logging.getLogger(__name__)

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
        self._write(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(path.name)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Write the name of the last checkpoint, whole or not at all."""
        self._write(Path(self.save_dir) / LAST_CHECKPOINT, last_filename_basename)

    @staticmethod
    def _write(path: Path, content: Content) -> None:
        def error_of(reason: str) -> CheckpointError:
            advice = f"check it: {reason}"
            return CheckpointError(
                [Fault("checkpoint", str(path), "a file that can be written", advice)]
            )

        write_atomically(path, content, error_of)

    def resume(
        self, check: Callable[[dict[str, Any]], Sequence[Fault]] | None = None
    ) -> dict[str, Any] | None:
        """Load the last whole checkpoint into the model and all checkpointables.

        Nothing is changed unless everything fits. A checkpoint of detectron2 or d2go, which has
        no record, loses its optimizer's state if that is ordered in another way.

        Args:
            check: told the content before anything is loaded; returns what is wrong with it.

        Returns:
            What else it holds: ``iteration``, the last one that was finished, ``images_seen``,
            ``sampler`` and the record ``d2scale``, as far as it has them; None if the folder has
            no checkpoint.

        Raises:
            CheckpointError: if none is whole, or it is of a newer format, or not of this run.
        """
        found = last_whole_checkpoint(Path(self.save_dir))
        if found is None:
            return None
        path, content = found
        logger.info("Resuming from %s", path)
        faults = _record_faults(path, content)
        if not faults and check is not None:
            faults = [*check(content)]
        if not faults:
            faults = mismatches(path, content["model"], self.model.state_dict())
        if faults:
            raise CheckpointError(faults)
        foreign = RECORD not in content
        states = {key: content.pop(key, None) for key in self.checkpointables}
        # The weights come last: what is refused leaves the model as it was.
        for key, state in states.items():
            self._load_state(path, key, state, foreign=foreign)
        self.model.load_state_dict(content.pop("model"))
        return content

    def _load_state(self, path: Path, key: str, state: Any, *, foreign: bool) -> None:
        each = self.checkpointables[key]
        if state is None:
            logger.warning("%s has no state of the %s: it starts anew", path, key)
            return
        try:
            if isinstance(each, torch.optim.Optimizer):
                load_optimizer_state(each, state)
            else:
                each.load_state_dict(state)
        except (ValueError, KeyError) as error:
            if foreign:
                logger.warning("the %s in %s does not fit (%s): it starts anew", key, path, error)
                return
            advice = f"resume with the recipe that the run was started with ({error})"
            fault = Fault(f"{key} in {path}", "other state", f"this run's {key}", advice)
            raise CheckpointError([fault]) from error


def _record_faults(path: Path, content: Mapping[str, Any]) -> list[Fault]:
    record = content.get(RECORD)
    if isinstance(record, dict) and record.get("format", 0) > FORMAT:
        return [
            Fault(
                f"format of checkpoint {path}",
                record["format"],
                f"at most {FORMAT}",
                "update d2scale",
            )
        ]
    # What detectron2 and d2go write has no record; where it stands is told by the iteration.
    needed = ("iteration",) if record is None else POSITION
    absent = [key for key in needed if key not in content]
    if absent or not isinstance(record, dict | None):
        return [
            Fault(
                f"checkpoint {path}",
                f"without {', '.join(absent) or 'a whole record'}",
                "a checkpoint with the state of its training",
                "to start a new training from its weights, set MODEL.WEIGHTS to it",
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
