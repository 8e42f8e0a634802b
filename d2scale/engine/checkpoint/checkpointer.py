"""Write the checkpoints of a run so that a kill cannot spoil them, and load them back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from d2scale.config.value_rules import is_whole
from d2scale.engine.checkpoint.files import WRONG_KIND, last_whole_checkpoint, mismatches
from d2scale.errors import CheckpointError, Fault
from d2scale.planning.progress import FORMAT, RECORD
from d2scale.run_folder.files import LAST_CHECKPOINT, write_atomically
from d2scale.step.optimizer_state import load_optimizer_state

logger = logging.getLogger(__name__)

# Besides weights and states: the progress of the training.
_PROGRESS = ("iteration", "images_seen", "sampler")


class RunCheckpointer:
    """Writes and loads checkpoints in fvcore's format, atomically and strictly.

    A file holds what fvcore writes (``model``, the state of each checkpointable by its name,
    ``iteration``) and, under ``d2scale``, the format's number and the facts of the run.

    ``checkpointables`` are objects with ``state_dict`` and ``load_state_dict``, or None. Nothing is
    written unless ``writes``, which is False on all ranks but the first.
    """

    def __init__(
        self, model: nn.Module, folder: str | Path, *, writes: bool = True, **checkpointables: Any
    ) -> None:
        self.model = model
        self.folder = Path(folder)
        # Plain values to keep with every checkpoint, such as the plan.
        self.facts: dict[str, Any] = {}
        self.checkpointables = {k: v for k, v in checkpointables.items() if v is not None}
        self._writes = writes

    def save(self, name: str, **progress: Any) -> None:
        """Write ``name``.pth whole or not at all, then make it the last checkpoint.

        Every rank calls it: some states are gathered. Raises CheckpointError if the folder cannot
        be written or is full.
        """
        states = {key: value.state_dict() for key, value in self.checkpointables.items()}
        if not self._writes:
            return
        record = {"format": FORMAT, **self.facts}
        content = {"model": self.model.state_dict(), **states, RECORD: record, **progress}
        path = self.folder / f"{name}.pth"
        logger.info("Saving checkpoint to %s", path)
        write_atomically(path, lambda file: torch.save(content, file), partial(_not_written, path))
        last = self.folder / LAST_CHECKPOINT
        write_atomically(last, path.name, partial(_not_written, last))

    def read_last(self) -> tuple[Path, dict[str, Any]] | None:
        """Read the last whole checkpoint; None if the folder has none.

        Besides weights and states it holds ``iteration``, the last one that was finished,
        ``images_seen``, ``sampler`` and the record ``d2scale``; one of detectron2 or d2go has
        only the iteration. Raises CheckpointError if none is whole, or it is of a newer format or
        of no training.
        """
        last = last_whole_checkpoint(self.folder)
        if last is not None and (faults := _record_faults(*last)):
            raise CheckpointError(faults)
        return last

    def load(self, path: Path, content: Mapping[str, Any]) -> None:
        """Load a checkpoint into the model and all checkpointables.

        Nothing is changed unless everything fits. A checkpoint of detectron2 or d2go, which has
        no record, loses its optimizer's state if that is ordered in another way. Raises
        CheckpointError if it is one of another model or optimizer.
        """
        logger.info("Resuming from %s", path)
        if faults := mismatches(path, content["model"], self.model.state_dict()):
            raise CheckpointError(faults)
        # The weights come last: what is refused leaves the model as it was.
        for key in self.checkpointables:
            if key in content:
                self._load_state(path, key, content[key], foreign=RECORD not in content)
            else:
                logger.warning("%s has no state of the %s: it starts anew", path, key)
        self.model.load_state_dict(content["model"])

    def _load_state(self, path: Path, key: str, state: Any, *, foreign: bool) -> None:
        target = self.checkpointables[key]
        try:
            if isinstance(target, torch.optim.Optimizer):
                load_optimizer_state(target, state)
            else:
                target.load_state_dict(state)
        except WRONG_KIND as error:
            reason = str(error).partition("\n")[0]
            if foreign:
                logger.warning("the %s in %s does not fit (%s): it starts anew", key, path, reason)
                return
            advice = f"resume with the recipe that the run was started with ({reason})"
            fault = Fault(f"{key} in {path}", "other state", f"this run's {key}", advice)
            raise CheckpointError([fault]) from error


def _not_written(path: Path, reason: str) -> CheckpointError:
    allowed = "a file that can be written"
    return CheckpointError([Fault("checkpoint", str(path), allowed, f"check it: {reason}")])


def _record_faults(path: Path, content: Mapping[str, Any]) -> list[Fault]:
    record = content.get(RECORD)
    number = record.get("format", 0) if isinstance(record, dict) else 0
    if is_whole(number) and number > FORMAT:
        key = f"format of checkpoint {path}"
        return [Fault(key, number, f"at most {FORMAT}", "update d2scale")]
    # What detectron2 and d2go write has no record; its progress is the iteration alone.
    needed = ("iteration",) if record is None else _PROGRESS
    missing = ", ".join(key for key in needed if not _is_progress(key, content.get(key)))
    if not missing and isinstance(record, dict | None):
        return []
    value = f"without {missing or 'a whole record'}"
    allowed = "a checkpoint with the state of its training"
    advice = "to start a new training from its weights, set MODEL.WEIGHTS to it"
    return [Fault(f"checkpoint {path}", value, allowed, advice)]


def _is_progress(key: str, value: Any) -> bool:
    return isinstance(value, dict) if key == "sampler" else is_whole(value) and value >= 0
