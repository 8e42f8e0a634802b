"""The largest batches of a detectron2 training: real samples, through the recipe's own mapper."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.data import get_detection_dataset_dicts
from torch import Tensor
from torch.nn import functional as F

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


def worst_batches(cfg: Any, make_mapper: Callable[[Any], Mapper]) -> WorstBatches:
    """Find the worst samples of ``DATASETS.TRAIN`` and augment them as in training.

    Args:
        cfg: of the training.
        make_mapper: makes the mapper of training from a config.

    Raises:
        DataError: if no image has an instance.
    """
    entries = _entries(cfg)
    counts = np.array([_annotations(entry) for entry in entries])
    if not counts.any():
        advice = "training would learn nothing: give a dataset with annotations"
        names = ",".join(cfg.DATASETS.TRAIN)
        raise DataError([Fault("DATASETS.TRAIN", names, "images with boxes", advice)])
    sizes = [(entry["height"], entry["width"]) for entry in entries]
    edge, longest = max(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    heights, widths = np.array([output_size(*size, edge, longest) for size in sizes]).T
    groups = np.zeros(len(entries), dtype=int)
    if cfg.DATALOADER.ASPECT_RATIO_GROUPING:
        original_heights, original_widths = np.array(sizes).T
        groups = aspect_ratio_groups(original_widths, original_heights)
    chosen = []
    for group in np.unique(groups):
        (members,) = np.nonzero(groups == group)
        worst = [members[values[members].argmax()] for values in (heights, widths, counts)]
        chosen.append([entries[index] for index in worst])

    def samples(factor: float) -> list[Sample]:
        mapper = make_mapper(_with_largest_size(cfg, factor))
        padded = [_worst_sample(cfg, mapper, candidates) for candidates in chosen]
        return sorted(padded, key=lambda sample: -sample["image"][0].numel())

    return WorstBatches(tuple(samples(1.0)), samples(_SMALLER)[0], len(entries))


def _entries(cfg: Any) -> list[dict[str, Any]]:
    """Return the images of the training dataset as detectron2's loader takes them."""
    keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    entries: list[dict[str, Any]] = get_detection_dataset_dicts(
        list(cfg.DATASETS.TRAIN),
        filter_empty=cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        min_keypoints=keypoints if cfg.MODEL.KEYPOINT_ON else 0,
        proposal_files=cfg.DATASETS.PROPOSAL_FILES_TRAIN if cfg.MODEL.LOAD_PROPOSALS else None,
    )
    return entries


def _annotations(entry: Mapping[str, Any]) -> int:
    return sum(not annotation.get("iscrowd", 0) for annotation in entry.get("annotations", ()))


def _with_largest_size(cfg: Any, factor: float) -> Any:
    largest = cfg.clone()
    largest.defrost()
    edge = round(max(cfg.INPUT.MIN_SIZE_TRAIN) * factor)
    is_range = cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    largest.INPUT.MIN_SIZE_TRAIN = (edge, edge) if is_range else (edge,)
    largest.INPUT.MAX_SIZE_TRAIN = round(cfg.INPUT.MAX_SIZE_TRAIN * factor)
    return largest


def _worst_sample(cfg: Any, mapper: Mapper, entries: Sequence[Mapping[str, Any]]) -> Sample:
    """Return the sample with the most instances, padded to the height and width of any."""
    mapped = [mapper(entry) for entry in entries for _ in range(_TRIES)]
    samples = [sample for sample in mapped if sample is not None]
    height, width = np.max([sample["image"].shape[-2:] for sample in samples], axis=0).tolist()
    crowded = max(samples, key=_instances)
    return _padded(crowded, height, width, cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)


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
