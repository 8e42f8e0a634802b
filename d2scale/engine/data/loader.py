"""Loaders: each item of a training loader is one rank's whole share of one optimizer step.

The share is made in chunks of a few images by worker processes, in order, so that all workers
work on one large step at once and what is made ahead is bounded by about one step. Nothing that
a worker does depends on which worker it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from fvcore.common.config import CfgNode

from d2scale.coco.records import CocoDataset, Records
from d2scale.coco.sizes import aspect_ratio_groups
from d2scale.engine.data.chunks import ChunkDataset, ChunkStream, Request, Sample
from d2scale.engine.data.sampling import Draw, StepSampler, rank_slice
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.errors import DataError

# Images. Small enough for several workers to share a step, and worth a message.
_LARGEST_CHUNK = 4


class TrainLoader(Iterator[list[Sample]]):
    """An endless stream of this rank's samples, one optimizer step an item.

    Args:
        records: the training images.
        augmentation: drawn for each image from the sampler's seed.
        sampler: where the stream starts; the loader keeps it at the steps handed out.
        world_size, rank: of this process.
        order: "BGR" or "RGB".
        num_workers: worker processes of this rank.
        exact: give all samples of a step, on all ranks, the same "pad_to".
        pin_memory: images in page-locked memory.
    """

    def __init__(
        self,
        records: Records,
        augmentation: ResizeAndFlip,
        sampler: StepSampler,
        *,
        world_size: int = 1,
        rank: int = 0,
        order: str = "BGR",
        num_workers: int = 0,
        exact: bool = False,
        pin_memory: bool = False,
    ) -> None:
        self._records = records
        self._augmentation = augmentation
        self._sampler = sampler
        self._share = rank_slice(sampler.ims_per_batch, world_size, rank)
        self._exact = exact
        images = self._share.stop - self._share.start
        self._chunk_size = max(1, min(_LARGEST_CHUNK, -(-images // max(1, num_workers))))
        self._chunks_per_step = -(-images // self._chunk_size)
        self._dataset = ChunkDataset(records, order, with_boxes=True)
        self._num_workers = num_workers
        self._pin_memory = pin_memory
        self._stream: ChunkStream | None = None

    def __next__(self) -> list[Sample]:
        if self._stream is None:
            self._stream = self._start()
        try:
            samples = [s for _ in range(self._chunks_per_step) for s in next(self._stream)]
        except DataError:
            self.close()
            raise
        next(self._sampler)
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Return the sampler's state after the steps that were handed out."""
        return self._sampler.state_dict()

    def close(self) -> None:
        """End the workers; the next step would start new ones at the same place."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _start(self) -> ChunkStream:
        return ChunkStream(
            self._dataset,
            self._requests(),
            num_workers=self._num_workers,
            ahead=self._chunks_per_step,
            pin_memory=self._pin_memory,
        )

    def _requests(self) -> Iterator[list[Request]]:
        # Runs ahead of what is handed out, so on a sampler of its own.
        sampler = StepSampler(
            self._sampler.size,
            self._sampler.ims_per_batch,
            self._sampler.seed,
            groups=self._sampler.groups,
        )
        sampler.load_state_dict(self._sampler.state_dict())
        for step in sampler:
            share = self._step_requests(step, sampler.seed)
            for start in range(0, len(share), self._chunk_size):
                yield share[start : start + self._chunk_size]

    def _step_requests(self, step: Sequence[Draw], seed: int) -> list[Request]:
        drawn = step if self._exact else step[self._share]
        requests = [self._request(draw, seed) for draw in drawn]
        if not self._exact:
            return requests
        sizes = [request.augmentation[:2] for request in requests]
        pad_to = (max(height for height, _ in sizes), max(width for _, width in sizes))
        return [request._replace(pad_to=pad_to) for request in requests[self._share]]

    def _request(self, draw: Draw, seed: int) -> Request:
        height = int(self._records.heights[draw.image])
        width = int(self._records.widths[draw.image])
        return Request(draw.image, self._augmentation.draw(seed, draw, height, width))


class EvalLoader(Iterable[list[Sample]]):
    """This rank's part of a dataset, once through and one image an item: no image sees padding.

    Args:
        records: all images.
        augmentation: the resizing.
        world_size, rank: of this process; each rank has a contiguous part.
        order, num_workers, pin_memory: as for :class:`TrainLoader`.
    """

    def __init__(
        self,
        records: Records,
        augmentation: ResizeAndFlip,
        *,
        world_size: int = 1,
        rank: int = 0,
        order: str = "BGR",
        num_workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        part = rank_slice(len(records), world_size, rank)
        self._records = records
        self._images = range(part.start, part.stop)
        self._augmentation = augmentation
        self._dataset = ChunkDataset(records, order, with_boxes=False)
        self._num_workers = num_workers
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[list[Sample]]:
        stream = ChunkStream(
            self._dataset,
            ([self._request(image)] for image in self._images),
            num_workers=self._num_workers,
            pin_memory=self._pin_memory,
        )
        try:
            for _ in self._images:
                yield next(stream)
        finally:
            stream.close()

    def _request(self, image: int) -> Request:
        height, width = int(self._records.heights[image]), int(self._records.widths[image])
        return Request(image, self._augmentation.draw(0, Draw(image, 0), height, width))


def build_train_loader(
    cfg: CfgNode,
    dataset: CocoDataset,
    *,
    world_size: int,
    rank: int,
    ims_per_batch: int,
    seed: int,
    start_state: dict[str, Any] | None = None,
    exact: bool = False,
) -> TrainLoader:
    """Build the training loader of one rank from ``INPUT``, ``DATALOADER`` and ``MODEL.DEVICE``.

    Args:
        cfg: the run's config.
        dataset: what to train on.
        world_size, rank: of this process.
        ims_per_batch: images in one optimizer step over all ranks.
        seed: of the order and the augmentations, the same on all ranks.
        start_state: continue here (:meth:`TrainLoader.state_dict`); its seed replaces ``seed``.
        exact: pad all images of a step alike, on every rank.

    Raises:
        ConfigError: if an ``INPUT`` key has a value that cannot be served.
        CheckpointError: if ``start_state`` belongs to another dataset.
    """
    records = dataset.records
    groups = None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = aspect_ratio_groups(records.widths, records.heights)
    sampler = StepSampler(len(records), ims_per_batch, seed, groups=groups)
    if start_state is not None:
        sampler.load_state_dict(start_state)
    return TrainLoader(
        records,
        ResizeAndFlip.for_training(cfg),
        sampler,
        world_size=world_size,
        rank=rank,
        exact=exact,
        **_common_options(cfg),
    )


def build_test_loader(
    cfg: CfgNode, dataset: CocoDataset, *, world_size: int, rank: int
) -> EvalLoader:
    """Build the evaluation loader of one rank, over every image of ``dataset``.

    Raises:
        ConfigError: if an ``INPUT`` key has a value that cannot be served.
    """
    return EvalLoader(
        dataset.records,
        ResizeAndFlip.for_testing(cfg),
        world_size=world_size,
        rank=rank,
        **_common_options(cfg),
    )


def _common_options(cfg: CfgNode) -> dict[str, Any]:
    return {
        "order": cfg.INPUT.FORMAT,
        "num_workers": cfg.DATALOADER.NUM_WORKERS,
        "pin_memory": cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
    }
