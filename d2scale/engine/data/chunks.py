"""Load samples in chunks: what a loader worker is asked for, and what it sends back.

A worker makes a few images at a time and sends their pixels as one block of shared memory: one
file handle and one pinned block for each chunk, not for each image.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch.utils.data import DataLoader, get_worker_info

from d2scale.coco.images import check_size
from d2scale.coco.records import Records
from d2scale.engine.data.images import read_image, resize_and_flip
from d2scale.engine.data.transforms import Augmentation, transform_boxes
from d2scale.errors import DataError
from d2scale.launch.children import end_with_parent
from d2scale.launch.workers import (
    TOLD_AFTER_SECONDS,
    check_room_for,
    patiently,
    share,
    tell_of_full_shm,
)

Sample = dict[str, Any]


class Request(NamedTuple):
    """One image to make: its number in the dataset and what to do to it."""

    image: int
    augmentation: Augmentation
    # (height, width) that the whole step is padded to; None for a micro-batch's own.
    pad_to: tuple[int, int] | None = None


@dataclass
class PackedChunk:
    """A few samples whose pixels lie one after the other in one tensor."""

    pixels: torch.Tensor | np.ndarray  # uint8, shape (total,); an array where memory is not shared
    samples: list[Sample]  # without "image"; boxes and classes as numpy arrays
    sizes: list[tuple[int, int]]  # (h, w) of each image

    def pin_memory(self) -> PackedChunk:
        """Move the pixels to page-locked memory (called by torch's data loader)."""
        self.pixels = torch.as_tensor(self.pixels).pin_memory()
        return self

    def share(self) -> PackedChunk:
        """Move the pixels to shared memory if there is room, else make them an array.

        Done here and not by torch's queue: that does it in a thread whose errors are lost, and a
        full /dev/shm (64 MB in a Docker container) would have the rank wait for ever. Arrays go
        through a pipe, which is slower.
        """
        pixels = torch.as_tensor(self.pixels)
        self.pixels = pixels if share(pixels) else pixels.numpy()
        return self

    def unpack(self) -> list[Sample]:
        """Return the samples; their images are views of ``pixels``."""
        start, pixels = 0, torch.as_tensor(self.pixels)
        for sample, (height, width) in zip(self.samples, self.sizes, strict=True):
            end = start + 3 * height * width
            sample["image"] = pixels[start:end].view(3, height, width)
            start = end
            for key in ("boxes", "classes"):
                if key in sample:
                    sample[key] = torch.from_numpy(sample[key])
        return self.samples


@dataclass(frozen=True)
class LoaderOptions:
    """How samples are made."""

    order: str = "BGR"  # of the channels; or "RGB"
    num_workers: int = 0  # worker processes of this rank; 0 makes the samples in the rank itself
    pin_memory: bool = False  # put the pixels into page-locked memory
    timeout_seconds: float = 600  # for which workers are waited for

    @classmethod
    def from_cfg(cls, cfg: CfgNode) -> LoaderOptions:
        """Read INPUT.FORMAT, DATALOADER.NUM_WORKERS, MODEL.DEVICE and the loader's timeout."""
        on_cuda = cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available()
        timeout = cfg.D2SCALE.LOADER_TIMEOUT_SECONDS
        return cls(cfg.INPUT.FORMAT, cfg.DATALOADER.NUM_WORKERS, on_cuda, timeout)


@dataclass(frozen=True)
class ChunkDataset:
    """Makes chunks: the map-style dataset that torch's data loader gives to its workers."""

    records: Records
    order: str  # of the channels, "BGR" or "RGB"
    with_boxes: bool  # add boxes and classes, for training

    def __getitem__(self, requests: Sequence[Request]) -> PackedChunk | DataError:
        """Make the requested samples, or return the error of a faulty image."""
        try:
            made = [self._make(request) for request in requests]
        except DataError as error:
            # Raised, torch's loader would put its whole traceback into the message.
            return error
        images = [image for image, _ in made]
        pixels = images[0].view(-1) if len(images) == 1 else torch.cat([i.view(-1) for i in images])
        sizes = [(int(image.shape[1]), int(image.shape[2])) for image in images]
        chunk = PackedChunk(pixels, [sample for _, sample in made], sizes)
        return chunk if get_worker_info() is None else chunk.share()

    def _make(self, request: Request) -> tuple[torch.Tensor, Sample]:
        record = self.records[request.image]
        image = read_image(record.file_name)
        check_size(record.file_name, image.shape[1:], record.height, record.width)
        sample: Sample = {
            "height": record.height,
            "width": record.width,
            "image_id": record.image_id,
            "file_name": record.file_name,
        }
        if request.pad_to is not None:
            sample["pad_to"] = request.pad_to
        if self.with_boxes:
            boxes, kept = transform_boxes(
                record.boxes, record.height, record.width, request.augmentation
            )
            sample["boxes"] = boxes
            sample["classes"] = np.ascontiguousarray(record.classes[kept])
        return resize_and_flip(image, request.augmentation, self.order), sample


def load_chunks(
    dataset: ChunkDataset,
    requests: Iterable[Sequence[Request]],
    options: LoaderOptions,
    *,
    ahead: int = 0,
) -> Generator[list[Sample], None, None]:
    """Yield the samples of each request, in order, made by worker processes.

    The workers start at the first chunk and end when the generator is closed. ``requests`` may be
    endless; ``ahead`` chunks are made before they are asked for, at least two for each worker.
    Raises the DataError of a worker.
    """
    # No name for the iterator here: a traceback would keep it, and its workers, alive.
    told = False
    for chunk in patiently(
        _start_workers(dataset, requests, options, ahead), options.timeout_seconds
    ):
        if isinstance(chunk, DataError):
            raise chunk
        if isinstance(chunk.pixels, np.ndarray) and not told:
            told = True
            tell_of_full_shm()
        yield chunk.unpack()


def _start_workers(
    dataset: ChunkDataset,
    requests: Iterable[Sequence[Request]],
    options: LoaderOptions,
    ahead: int,
) -> Iterator[PackedChunk | DataError]:
    workers = options.num_workers
    check_room_for(workers)
    with warnings.catch_warnings():
        # That there are more workers than cores: the recipe asks for them.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader: DataLoader[Any] = DataLoader(
            dataset,  # type: ignore[arg-type]
            batch_size=None,
            sampler=requests,
            num_workers=workers,
            prefetch_factor=max(2, -(-ahead // workers)) if workers else None,
            collate_fn=_unchanged,
            pin_memory=options.pin_memory,
            # A generator of its own: making workers must not move the global one.
            generator=torch.Generator(),
            timeout=TOLD_AFTER_SECONDS if workers else 0,
            worker_init_fn=partial(end_with_parent, os.getpid()),
        )
        return iter(loader)


def _unchanged(chunk: Any) -> Any:
    return chunk
