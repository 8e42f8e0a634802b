"""Reading datasets by name; all faults of a dataset are reported together."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from d2scale.coco.annotation_faults import (
    category_faults,
    link_faults,
    missing_image_faults,
    usable_boxes,
)
from d2scale.coco.annotation_file import AnnotationFile, read_annotation_file
from d2scale.coco.catalog import DatasetSpec, dataset_spec, path_advice
from d2scale.coco.digests import DataFacts, data_facts
from d2scale.coco.records import CocoDataset, Records, concatenate, starts_from_counts
from d2scale.errors import DataError, Fault, collecting

logger = logging.getLogger(__name__)


def load_dataset(name: str, *, key: str = "DATASETS", cfg: Any = None) -> CocoDataset:
    """Read the images of a dataset and the boxes of its classes, without crowds.

    Raises:
        DataError: one line for each kind of fault; ``key`` of ``cfg`` held the name.
    """
    spec = dataset_spec(name, key=key, cfg=cfg)
    check_files_exist(name, spec, key=key)
    file = read_annotation_file(spec.json_file)
    if not len(file.image_ids):
        raise DataError([Fault(key, name, "a dataset with images", f"{file.path} lists none")])
    wanted = _wanted_classes(file, spec)
    faults = [
        *link_faults(file),
        *category_faults(file, wanted),
        *missing_image_faults(file, spec.image_root),
    ]
    boxes, usable = usable_boxes(file, faults)
    if faults:
        raise DataError(faults)
    return CocoDataset(
        name=name,
        class_names=tuple(file.categories[i] for i in wanted),
        category_ids=tuple(wanted),
        records=_to_records(file, spec.image_root, tuple(wanted), boxes, usable),
        json_file=str(spec.json_file),
    )


def check_files_exist(name: str, spec: DatasetSpec, *, key: str = "DATASETS") -> None:
    """Raise a DataError if a dataset's annotation file or its folder of images is not there."""
    absent = [path for path in (spec.json_file, spec.image_root) if not path.exists()]
    if not absent:
        return
    advice = f"{' and '.join(map(str, absent))} not found; {path_advice(absent)}"
    raise DataError([Fault(key, name, "a dataset that is on this machine", advice)])


def _wanted_classes(file: AnnotationFile, spec: DatasetSpec) -> Mapping[int, str]:
    """Return the category ids in class order, with the name that each must have, or ''."""
    if spec.category_ids is None:
        return file.categories
    names = spec.class_names or ("",) * len(spec.category_ids)
    return dict(zip(spec.category_ids, names, strict=True))


def _to_records(
    file: AnnotationFile,
    image_root: Path,
    category_ids: tuple[int, ...],
    boxes: np.ndarray,
    usable: np.ndarray,
) -> Records:
    numbers = {category_id: number for number, category_id in enumerate(category_ids)}
    classes = np.array([numbers.get(i, -1) for i in file.category_ids.tolist()], dtype=np.int64)
    kept = np.flatnonzero(usable & (classes >= 0))
    # By image; within one image as the file has them.
    kept = kept[np.argsort(file.image_numbers[kept], kind="stable")]
    counts = np.bincount(file.image_numbers[kept], minlength=len(file.image_ids))
    return Records(
        file_names=np.array([os.fsencode(image_root / name) for name in file.file_names]),
        image_ids=file.image_ids,
        heights=file.heights,
        widths=file.widths,
        box_starts=starts_from_counts(counts),
        boxes=boxes[kept].astype(np.float32),
        classes=classes[kept],
    )


def load_training_dataset(cfg: CfgNode) -> CocoDataset:
    """Read ``DATASETS.TRAIN`` as one dataset, without images that have no boxes.

    Images without boxes stay where ``DATALOADER.FILTER_EMPTY_ANNOTATIONS`` is False.

    Raises:
        DataError: if a dataset is faulty, if they differ in their classes, if no image is left.
    """
    names = tuple(cfg.DATASETS.TRAIN)
    if not names:
        advice = "name the training dataset"
        raise DataError([Fault("DATASETS.TRAIN", names, "at least one dataset", advice)])
    parts = [load_dataset(name, key="DATASETS.TRAIN", cfg=cfg) for name in names]
    for part in parts[1:]:
        if part.class_names != parts[0].class_names:
            raise DataError([_class_fault("DATASETS.TRAIN", part, parts[0])])
    records = concatenate([part.records for part in parts])
    if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        before, records = len(records), records.with_boxes_only()
        logger.info("left out %d of %d images without boxes", before - len(records), before)
    if not len(records):
        advice = "use another dataset, or set DATALOADER.FILTER_EMPTY_ANNOTATIONS to False"
        allowed = "datasets with boxes of their classes"
        raise DataError([Fault("DATASETS.TRAIN", names, allowed, advice)])
    json_file = parts[0].json_file if len(parts) == 1 else ""
    return replace(parts[0], name=",".join(names), records=records, json_file=json_file)


def _class_fault(key: str, dataset: CocoDataset, trained: CocoDataset) -> Fault:
    return Fault(
        key,
        dataset.name,
        f"datasets with the {len(trained.class_names)} classes of {trained.name}",
        f"it has {len(dataset.class_names)} classes; use the same split for all",
    )


def check_datasets(cfg: CfgNode, *, eval_only: bool = False) -> DataFacts:
    """Read every dataset that a run will use, before any rank starts.

    With ``eval_only`` that is ``DATASETS.TEST`` only.

    Raises:
        DataError: every fault of every dataset.
    """
    faults: list[Fault] = []
    trained, tested = None, []
    if not eval_only:
        with collecting(faults):
            trained = load_training_dataset(cfg)
    elif not cfg.DATASETS.TEST:
        advice = "name the dataset to evaluate"
        faults.append(Fault("DATASETS.TEST", (), "at least one dataset", advice))
    for name in cfg.DATASETS.TEST:
        with collecting(faults):
            tested.append(load_dataset(name, key="DATASETS.TEST", cfg=cfg))
            if trained and tested[-1].class_names != trained.class_names:
                faults.append(_class_fault("DATASETS.TEST", tested[-1], trained))
    if faults:
        # Two splits of one file share its faults.
        raise DataError(list({str(fault): fault for fault in faults}.values()))
    return data_facts(trained, tested)
