"""The largest batches of a detectron2 training: real samples, through the recipe's own mapper."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import get_detection_dataset_dicts
from torch import Tensor
from torch.nn import functional as F

from d2scale.coco.catalog import ROOT_VARIABLE
from d2scale.coco.sizes import aspect_ratio_groups, output_size
from d2scale.errors import DataError, Fault

Sample = dict[str, Any]
Mapper = Callable[[Mapping[str, Any]], Sample | None]

# Random augmentation gives an image another size each time.
_TRIES = 3
_SMALLER = 0.8


@dataclass(frozen=True)
class WorstBatches:
    """The largest batches that the images of a dataset can make."""

    # Of each group of images that batches are made of, the sample with the most instances, padded
    # to the height and the width that a batch of the group can have; the largest area first.
    largest: tuple[Sample, ...]
    smaller: Sample  # the first of them at a smaller size
    images: int  # in the dataset
    name: str  # of the dataset

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the largest batch, before the model pads it to its multiple."""
        height, width = self.largest[0]["image"].shape[-2:]
        return height, width

    @property
    def instances(self) -> int:
        """The most instances of a sample."""
        return max(map(_instances, self.largest))

    def batch(self, count: int) -> list[Sample]:
        """Return the largest batch of ``count`` images, which share their memory."""
        return _repeated(self.largest[0], count)

    def trial_batches(self, count: int) -> list[list[Sample]]:
        """Return each group's largest batch, a smaller one and the largest again.

        Steps of other sizes leave the allocator's cache in pieces, in which the largest batch
        must still find room.
        """
        samples = (*self.largest, self.smaller, self.largest[0])
        return [_repeated(sample, count) for sample in samples]


@dataclass(frozen=True)
class TrainingImages:
    """The images of a training, and how it augments them."""

    name: str  # of the datasets, for faults
    entries: Sequence[Mapping[str, Any]]  # as detectron2's loader takes them
    make_mapper: Callable[[float], Mapper]  # for a part of the largest size, 1 for that itself
    short_edge: int  # the longest that the shorter edge becomes in resizing; 0: not resized so
    max_size: int  # the longest that the longer edge becomes
    grouped: bool  # whether a batch holds only wide or only high images
    ignore_value: int  # of classes of pixels that the loss ignores


def images_of(cfg: Any, make_mapper: Callable[[Any], Mapper]) -> TrainingImages:
    """Return the training images of a YAML recipe.

    Args:
        cfg: of the training.
        make_mapper: makes the mapper of training from a config.

    Raises:
        DataError: if the dataset is not there.
    """
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    names = ",".join(cfg.DATASETS.TRAIN)
    with missing_data(names):
        entries = get_detection_dataset_dicts(
            list(cfg.DATASETS.TRAIN),
            filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
            min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
            proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
        )
    return TrainingImages(
        names,
        entries,
        lambda part: make_mapper(_with_largest_size(cfg, part)),
        max(cfg.INPUT.MIN_SIZE_TRAIN),
        cfg.INPUT.MAX_SIZE_TRAIN,
        cfg.DATALOADER.ASPECT_RATIO_GROUPING,
        cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE,
    )


@contextmanager
def missing_data(names: str) -> Iterator[None]:
    """Within the context, a dataset or a file of one that is not there is a DataError."""
    try:
        yield
    except (OSError, KeyError, AssertionError) as error:
        reason = " ".join(str(error).split())
        advice = f"set {ROOT_VARIABLE} to the folder of the datasets ({reason})"
        fault = Fault("DATASETS.TRAIN", names, "datasets that are registered and there", advice)
        raise DataError([fault]) from error


def worst_batches(images: TrainingImages) -> WorstBatches:
    """Find the worst samples of a training's images, augmented as in training.

    Raises:
        DataError: if no image has an instance, or a file is not there.
    """
    entries = images.entries
    counts = np.array([_annotations(entry) for entry in entries])
    if not counts.any():
        advice = "training would learn nothing: give a dataset with annotations"
        raise DataError([Fault("DATASETS.TRAIN", images.name, "images with boxes", advice)])
    sizes = [(entry["height"], entry["width"]) for entry in entries]
    limits = (images.short_edge, images.max_size)
    heights, widths = np.array([output_size(*size, *limits) for size in sizes]).T
    groups = np.zeros(len(entries), dtype=int)
    if images.grouped:
        original_heights, original_widths = np.array(sizes).T
        groups = aspect_ratio_groups(original_widths, original_heights)
    chosen = []
    for group in np.unique(groups):
        (members,) = np.nonzero(groups == group)
        worst = [members[values[members].argmax()] for values in (heights, widths, counts)]
        chosen.append([entries[index] for index in worst])

    def samples(part: float) -> list[Sample]:
        mapper = images.make_mapper(part)
        padded = [_worst_sample(mapper, candidates, images.ignore_value) for candidates in chosen]
        return sorted(padded, key=lambda sample: -sample["image"][0].numel())

    with missing_data(images.name):
        return WorstBatches(tuple(samples(1.0)), samples(_SMALLER)[0], len(entries), images.name)


def _annotations(entry: Mapping[str, Any]) -> int:
    return sum(not annotation.get("iscrowd", 0) for annotation in entry.get("annotations", ()))


def _with_largest_size(cfg: Any, part: float) -> Any:
    largest = cfg.clone()
    largest.defrost()
    edge = round(max(cfg.INPUT.MIN_SIZE_TRAIN) * part)
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    largest.INPUT.MIN_SIZE_TRAIN = (edge, edge) if is_range else (edge,)
    largest.INPUT.MAX_SIZE_TRAIN = round(cfg.INPUT.MAX_SIZE_TRAIN * part)
    return largest


def _worst_sample(
    mapper: Mapper, entries: Sequence[Mapping[str, Any]], ignore_value: int
) -> Sample:
    """Return the sample with the most instances, padded to the height and width of any."""
    # A mapper may change its entry.
    mapped = [mapper(copy.deepcopy(entry)) for entry in entries for _ in range(_TRIES)]
    samples = [sample for sample in mapped if sample is not None]
    height, width = np.max([sample["image"].shape[-2:] for sample in samples], axis=0).tolist()
    crowded = max(samples, key=_instances)
    return _padded(crowded, height, width, ignore_value)


def _padded(sample: Sample, height: int, width: int, ignore_value: int) -> Sample:
    """Return a sample whose image and maps have another size, as in a batch with larger ones."""
    own_height, own_width = sample["image"].shape[-2:]
    padded = dict(sample)
    for name, value in sample.items():
        if isinstance(value, Tensor) and value.shape[-2:] == (own_height, own_width):
            fill = ignore_value if name == "sem_seg" else 0
            edges = (0, width - own_width, 0, height - own_height)
            padded[name] = F.pad(value, edges, value=fill)
    return padded


def _instances(sample: Mapping[str, Any]) -> int:
    return len(sample.get("instances", ()))


def _repeated(sample: Sample, count: int) -> list[Sample]:
    return [dict(sample) for _ in range(count)]
