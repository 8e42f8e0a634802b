"""One training loader to a process, each item its images of one optimizer step."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, islice
from typing import Any

import torch
from torch.utils.data import DataLoader

from d2scale.detectron2.data.batches import (
    AspectRatioGroups,
    StepsTaken,
    VirtualRankBatches,
    batches_after,
    one_group,
)
from d2scale.detectron2.data.from_upstream import ForeignLoaderError, LoaderParts, take_apart
from d2scale.detectron2.data.mapping import Request, SeededMapping
from d2scale.detectron2.data.patient import LOADER_SECONDS, patient
from d2scale.detectron2.data.private_upstream import drawn_by, seed_of, shared_stream, with_drawn
from d2scale.errors import CheckpointError, ConfigError, D2ScaleError, Fault

logger = logging.getLogger(__name__)


class TrainLoader(Iterator[list[Any]]):
    """An endless stream of this process's samples, one optimizer step an item.

    An item is one flat list, the process's virtual ranks in order. It depends on the sampler's
    seed, the step and the layout of the batch alone: not on processes, workers or history.

    Args:
        parts: of the loader that the recipe builds.
        own: the virtual ranks of this process.
        virtual_ranks: how many there are, N0.
        ims_per_virtual_rank: images of each in a step, B0 / N0.
        timeout_seconds: for which workers are waited for.
    """

    def __init__(
        self,
        parts: LoaderParts,
        own: range,
        virtual_ranks: int,
        ims_per_virtual_rank: int,
        timeout_seconds: float = LOADER_SECONDS,
    ) -> None:
        self._parts = parts
        self._timeout_seconds = timeout_seconds
        self._sampler = parts.sampler
        self._own = own
        self._layout = (virtual_ranks, ims_per_virtual_rank)
        self._history: list[StepsTaken] = []
        self._steps = 0  # handed out since the history
        self._batches: Iterator[list[Any] | D2ScaleError] | None = None

    def __next__(self) -> list[Any]:
        if self._batches is None:
            self._batches = self._start_workers()
        try:
            samples = [sample for _ in self._own for sample in self._one_batch()]
        except D2ScaleError:
            self.close()
            raise
        self._steps += 1
        return self._parts.pass_on(samples)

    def state_dict(self) -> dict[str, Any]:
        """Return the place in the stream after the steps that were handed out."""
        history = self._history
        if history and history[-1][1:] == self._layout:
            before, history = history[-1].steps, history[:-1]
        else:
            before = 0
        steps = [*history, StepsTaken(before + self._steps, *self._layout)]
        return {
            "images": len(self._parts.entries),
            "drawn": drawn_by(self._sampler),
            "steps": [list(taken) for taken in steps],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on at the place, and with the seed, of another loader over the dataset.

        The other's batch may have had another layout. Raises CheckpointError if the state belongs
        to a dataset of another size.
        """
        images = len(self._parts.entries)
        if state["images"] != images:
            allowed = f"{images}, the images of this run's training dataset"
            advice = "continue with the dataset that the run was started with"
            fault = Fault("images of the checkpoint's dataset", state["images"], allowed, advice)
            raise CheckpointError([fault])
        self._sampler = with_drawn(self._parts.sampler, state["drawn"])
        self._begin_after([StepsTaken(*taken) for taken in state["steps"]])

    def begin_after_steps(self, steps: int) -> None:
        """Begin after the first steps of this layout, as a loader does that has handed them out."""
        self._begin_after([StepsTaken(steps, *self._layout)])

    def begin_after_images(self, images_seen: int) -> None:
        """Begin after the first images of the stream, where nothing else is known of a training."""
        self._begin_after([StepsTaken(images_seen, 1, 1)])

    def close(self) -> None:
        """End the workers; the next step would start new ones at the same place."""
        self._begin_after([StepsTaken(*taken) for taken in self.state_dict()["steps"]])

    def _begin_after(self, history: list[StepsTaken]) -> None:
        self._batches = None
        self._history = history
        self._steps = 0

    def _one_batch(self) -> list[Any]:
        # No name for the iterator: a traceback would keep it, and its workers, alive.
        assert self._batches is not None
        batch = next(self._batches)
        if isinstance(batch, D2ScaleError):
            raise batch
        if not isinstance(batch, list) or len(batch) != self._layout[1]:
            raise _cannot_be_cut(batch)
        return batch

    def _start_workers(self) -> Iterator[list[Any] | D2ScaleError]:
        group_of = AspectRatioGroups(self._parts.entries) if self._parts.grouped else one_group
        mapping = SeededMapping(self._parts, seed_of(self._sampler), group_of)
        stream = shared_stream(self._sampler)
        batches = batches_after(self._history, stream, *self._layout, group_of)
        first_step = sum(taken.steps for taken in self._history)
        with warnings.catch_warnings():
            # That there are more workers than cores: the recipe asks for them.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            loader: DataLoader[Any] = DataLoader(
                mapping,  # type: ignore[arg-type]
                batch_size=None,
                sampler=_requests(batches, self._own, first_step),
                collate_fn=_unchanged,
                # A generator of its own: making workers must not move the global one.
                generator=torch.Generator(),
                **self._parts.options,
            )
            # Begun at once, while the warning is left out.
            return iter(patient(loader, self._timeout_seconds))


class CutLoader(Iterator[list[Any]]):
    """The samples of a foreign loader in its own order, as many an item as a process needs."""

    def __init__(self, loader: Iterable[Any], images: int) -> None:
        self._loader = loader
        self._images = images
        self._samples: Iterator[Any] | None = None

    def __next__(self) -> list[Any]:
        if self._samples is None:
            self._samples = chain.from_iterable(map(_as_samples, self._loader))
        samples = list(islice(self._samples, self._images))
        if len(samples) < self._images:
            raise StopIteration
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the place in a foreign loader is not known."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Begin anew."""

    def begin_after_steps(self, steps: int) -> None:
        """Begin anew."""

    def begin_after_images(self, images_seen: int) -> None:
        """Begin anew."""

    def close(self) -> None:
        """Let go of the loader's iterator, and with it of its workers."""
        self._samples = None


def train_loader(
    loader: Any,
    own: range,
    virtual_ranks: int,
    ims_per_virtual_rank: int,
    timeout_seconds: float = LOADER_SECONDS,
) -> TrainLoader | CutLoader:
    """Return a loader of this process's images, from the one that the recipe builds.

    The latter is only taken apart, so its own batch size does not matter (see
    :func:`with_even_batch`). One that cannot be is read in its own order, with a warning.

    Args:
        loader: detectron2's, d2go's or a user's own.
        own: the virtual ranks of this process.
        virtual_ranks: how many there are, N0.
        ims_per_virtual_rank: images of each in a step, B0 / N0.
        timeout_seconds: for which workers are waited for.
    """
    try:
        parts = take_apart(loader)
    except ForeignLoaderError as reason:
        logger.warning(
            "The training loader is read as it comes, because %s: which images a virtual rank "
            "gets, and their augmentation, depend on the number of processes, and a resumed "
            "training begins its order anew",
            reason,
        )
        loader = patient(loader, timeout_seconds)
        return CutLoader(loader, len(own) * ims_per_virtual_rank)
    return TrainLoader(parts, own, virtual_ranks, ims_per_virtual_rank, timeout_seconds)


def with_even_batch(cfg: Any, world_size: int) -> Any:
    """Return ``cfg`` with a total batch of which every process builds a loader of the same size.

    detectron2 refuses to build another, and for :func:`train_loader` the size does not matter.
    """
    images, frozen = cfg.SOLVER.IMS_PER_BATCH, cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.IMS_PER_BATCH = -(-images // world_size) * world_size
    if frozen:
        cfg.freeze()
    return cfg


# No method: a loader in a reference cycle would keep its workers alive, and then wait for them.
def _requests(batches: VirtualRankBatches, own: range, first_step: int) -> Iterator[Request]:
    for step, images in enumerate(batches, start=first_step):
        for virtual_rank in own:
            yield Request(step, virtual_rank, images[virtual_rank])


def _as_samples(batch: Any) -> list[Any]:
    if not isinstance(batch, (list, tuple)):
        raise _cannot_be_cut(batch)
    return list(batch)


def _cannot_be_cut(batch: Any) -> ConfigError:
    advice = "let its collate_fn return a list, or train with D2SCALE.VIRTUAL_RANKS off"
    allowed = "a list of the samples of its images"
    fault = Fault("a batch of the training loader", type(batch).__name__, allowed, advice)
    return ConfigError([fault])


def _unchanged(batch: Any) -> Any:
    return batch
