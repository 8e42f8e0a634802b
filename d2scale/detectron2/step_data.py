"""A rank's samples of each optimizer step, as the recipe's ranks would have loaded them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from detectron2.engine import SimpleTrainer

from d2scale.detectron2.data.loader import CutLoader, TrainLoader, train_loader
from d2scale.detectron2.data.patient import patient
from d2scale.detectron2.private_upstream import next_batch
from d2scale.planning.plan import Plan
from d2scale.planning.rules import own_virtual_ranks
from d2scale.step import ranks


class Layout(NamedTuple):
    """Which of a step's images a rank has."""

    own: range  # virtual ranks of this rank
    virtual_ranks: int  # in a step
    ims_per_virtual_rank: int

    @classmethod
    def of_plan(cls, plan: Plan) -> Layout:
        """Return this rank's part; without virtual ranks each rank is one."""
        count = plan.virtual_ranks or ranks.world_size()
        own = own_virtual_ranks(count, ranks.rank(), ranks.world_size())
        return cls(own, count, plan.ims_per_batch // count)


class StepData:
    """Reads a trainer's samples, one step at a time.

    Args:
        trainer: if there is a layout, its loader is replaced by d2scale's over the same data.
        layout: None: the trainer's own loader already yields a rank's samples of a step.
        timeout_seconds: for which the loader's workers are waited for.
    """

    def __init__(
        self, trainer: SimpleTrainer, layout: Layout | None, timeout_seconds: float
    ) -> None:
        self._trainer = trainer
        self._layout = layout
        self._loader: TrainLoader | CutLoader | None = None
        loader = trainer.data_loader
        if layout is None:
            loader = patient(loader, timeout_seconds)
        else:
            self._loader = loader = train_loader(loader, *layout, timeout_seconds)
        trainer.reset_data_loader(lambda: loader)

    def begin_at(self, place: Mapping[str, Any] | None, images_seen: int) -> None:
        """Go on at the place of a checkpoint, or after as many images where it has none.

        Raises CheckpointError if the place is of other data.
        """
        if isinstance(self._loader, TrainLoader):
            if place:
                self._loader.load_state_dict(place)
            elif images_seen:
                self._loader.begin_after_images(images_seen)

    def place(self) -> Mapping[str, Any] | None:
        """Return the place after the samples that were read, None if it is not known."""
        return self._loader.state_dict() if self._loader else None

    def read(self) -> list[Any]:
        """Return this rank's samples of the next step, in the order of its virtual ranks."""
        samples = next_batch(self._trainer)
        size = self._layout.ims_per_virtual_rank if self._layout else max(1, len(samples))
        cuts = range(0, len(samples), size)
        return [sample for at in cuts for sample in _padded_alike(samples[at : at + size])]


def _padded_alike(batch: Sequence[Any]) -> list[Any]:
    """Give every image the size to which detectron2 would pad the whole batch."""
    images = [sample["image"] for sample in batch if "image" in sample]
    if len(images) < len(batch):
        return list(batch)
    pad_to = tuple(max(image.shape[side] for image in images) for side in (1, 2))
    return [{**sample, "pad_to": pad_to} for sample in batch]
