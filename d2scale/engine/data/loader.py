"""Loaders: each item of a training loader is one rank's batch of one optimizer step.

The batch is made in chunks of a few images by worker processes, in order, so that all workers
work on one large step at once and what is made ahead is bounded by about one step. Nothing that
a worker does depends on which worker it is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from copy import deepcopy
from dataclasses import replace
from typing import Any

from fvcore.common.config import CfgNode

from d2scale.coco.records import CocoDataset, Records
from d2scale.coco.sizes import aspect_ratio_groups
from d2scale.engine.data.chunks import ChunkDataset, LoaderOptions, Request, Sample, load_chunks
from d2scale.engine.data.sampling import Draw, StepSampler, rank_slice
from d2scale.engine.data.transforms import ResizeAndFlip
from d2scale.errors import DataError
from d2scale.planning.rules import own_virtual_ranks

# Images. Small enough for several workers to share a step, large enough to be worth a message.
_LARGEST_CHUNK = 4


class TrainLoader(Iterator[list[Sample]]):
    """An endless stream of this rank's samples, one optimizer step an item."""

    def __init__(
        self,
        records: Records,
        augmentation: ResizeAndFlip,  # drawn for each image from the sampler's seed
        sampler: StepSampler,  # where the stream starts; kept at the steps handed out
        rank_images: slice,  # which images of a step are this rank's
        *,
        exact: bool,  # give all samples of a step, on all ranks, the same "pad_to"
        options: LoaderOptions,
    ) -> None:
        self._records = records
        self._augmentation = augmentation
        self._sampler = sampler
        self._rank_images = rank_images
        self._exact = exact
        self._options = options
        images = rank_images.stop - rank_images.start
        self._chunk_size = max(1, min(_LARGEST_CHUNK, -(-images // max(1, options.num_workers))))
        self._chunks_per_step = -(-images // self._chunk_size)
        self._chunks: Generator[list[Sample], None, None] | None = None

    def __next__(self) -> list[Sample]:
        if self._chunks is None:
            dataset = ChunkDataset(self._records, self._options.order, with_boxes=True)
            self._chunks = load_chunks(
                dataset, self._requests(), self._options, ahead=self._chunks_per_step
            )
        try:
            samples = [s for _ in range(self._chunks_per_step) for s in next(self._chunks)]
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
        if self._chunks is not None:
            self._chunks.close()
            self._chunks = None

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _requests(self) -> Iterator[list[Request]]:
        # Runs ahead of the steps that are handed out, so on a sampler of its own.
        sampler = deepcopy(self._sampler)
        for step in sampler:
            requests = [
                _request(self._records, self._augmentation, draw, sampler.seed)
                for draw in (step if self._exact else step[self._rank_images])
            ]
            if self._exact:
                height = max(request.augmentation.height for request in requests)
                width = max(request.augmentation.width for request in requests)
                requests = [r._replace(pad_to=(height, width)) for r in requests[self._rank_images]]
            for start in range(0, len(requests), self._chunk_size):
                yield requests[start : start + self._chunk_size]


class EvalLoader(Iterable[list[Sample]]):
    """This rank's part of a dataset, once through and one image an item: no image sees padding."""

    def __init__(
        self,
        records: Records,
        augmentation: ResizeAndFlip,
        rank_images: slice,  # which images are this rank's
        options: LoaderOptions,
    ) -> None:
        self._records = records
        self._augmentation = augmentation
        self._images = range(rank_images.start, rank_images.stop)
        self._options = options

    def __len__(self) -> int:
        return len(self._images)

    def __iter__(self) -> Iterator[list[Sample]]:
        dataset = ChunkDataset(self._records, self._options.order, with_boxes=False)
        draws = (Draw(image, 0) for image in self._images)
        requests = ([_request(self._records, self._augmentation, draw, 0)] for draw in draws)
        yield from load_chunks(dataset, requests, self._options)


def _request(records: Records, augmentation: ResizeAndFlip, draw: Draw, seed: int) -> Request:
    height, width = int(records.heights[draw.image]), int(records.widths[draw.image])
    return Request(draw.image, augmentation.draw(seed, draw, height, width))


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
    virtual_ranks: int = 0,
) -> TrainLoader:
    """Build the training loader of one rank from ``INPUT``, ``DATALOADER`` and ``MODEL.DEVICE``.

    Args:
        ims_per_batch: images in one optimizer step, over all ranks.
        seed: of the order and the augmentations, the same on all ranks.
        start_state: continue here (:meth:`TrainLoader.state_dict`); its seed replaces ``seed``.
        exact: pad all images of a step alike, on every rank.
        virtual_ranks: of a step, each with as many images, which no rank shares; 0: none.

    Raises:
        ConfigError: if an ``INPUT`` key has a value that cannot be served.
        CheckpointError: if ``start_state`` belongs to another dataset.
    """
    records, groups = dataset.records, None
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        groups = aspect_ratio_groups(records.widths, records.heights)
    sampler = StepSampler(len(records), ims_per_batch, seed, groups=groups)
    if start_state is not None:
        sampler.load_state_dict(start_state)
    augmentation = ResizeAndFlip.for_training(cfg)
    rank_images = rank_slice(ims_per_batch, world_size, rank)
    if virtual_ranks:
        own = own_virtual_ranks(virtual_ranks, rank, world_size)
        rank_images = _images_of(own, ims_per_batch // virtual_ranks)
    options = LoaderOptions.from_cfg(cfg)
    return TrainLoader(records, augmentation, sampler, rank_images, exact=exact, options=options)


def _images_of(own: range, images: int) -> slice:
    return slice(own.start * images, own.stop * images)


def build_test_loader(
    cfg: CfgNode, dataset: CocoDataset, *, world_size: int, rank: int, keep_above: int = 0
) -> EvalLoader:
    """Build the evaluation loader of one rank, over every image of ``dataset``.

    Images with an edge of more than ``keep_above`` pixels, unless it is 0, are not resized. Raises
    ConfigError if an ``INPUT`` key has a value that cannot be served.
    """
    rank_images = rank_slice(len(dataset), world_size, rank)
    augmentation = replace(ResizeAndFlip.for_testing(cfg), keep_above=keep_above)
    return EvalLoader(dataset.records, augmentation, rank_images, LoaderOptions.from_cfg(cfg))
