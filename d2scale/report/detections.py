"""A run's detections, and the test set that they are evaluated on."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from d2scale.coco.annotation_file import AnnotationFile, read_annotation_file
from d2scale.coco.catalog import (
    ROOT_VARIABLE,
    DatasetSpec,
    dataset_names,
    dataset_spec,
    path_advice,
)
from d2scale.coco.matching import Detections, GroundTruth
from d2scale.coco.results import CocoResults
from d2scale.errors import DataError, Fault
from d2scale.report.runs import Run
from d2scale.run_folder.files import INFERENCE_FOLDER, RESULTS_FILE


@dataclass(frozen=True)
class EvaluationSet:
    """A test set as annotated. Its images need not be there."""

    name: str  # as in ``DATASETS.TEST``
    file: AnnotationFile
    image_root: Path
    category_ids: tuple[int, ...]  # of the evaluated classes, ascending

    def __len__(self) -> int:
        return len(self.file.image_ids)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names, in the order of ``category_ids``."""
        return tuple(self.file.categories[category_id] for category_id in self.category_ids)

    @cached_property
    def truth(self) -> GroundTruth:
        """The boxes of the evaluated classes, images and classes by number."""
        return self.file.ground_truth(np.array(self.category_ids), self.file.image_ids)

    def boxes_of(self, image: int) -> GroundTruth:
        """Return the boxes of one image that should be detected."""
        return self.truth.take((self.truth.images == image) & ~self.truth.crowds)

    def path_of(self, image: int) -> Path:
        """Return the file of an image."""
        return self.image_root / self.file.file_names[image]


class RunDetections(NamedTuple):
    """What a run detected on its test set."""

    dataset: EvaluationSet
    detections: Detections  # of its classes, images and classes by number as in ``dataset.truth``
    max_dets: int  # best detections of an image and class that count


def evaluation_spec(name: str, cfg: Any = None) -> DatasetSpec:
    """Return where a test set is; DataError if nobody knows the name, ``cfg`` included."""
    if name not in dataset_names(cfg):
        raise _fault(name, "a registered test set", "its ground truth is not known here")
    return dataset_spec(name, cfg=cfg)


def read_evaluation_set(name: str, spec: DatasetSpec) -> EvaluationSet:
    """Read a dataset's annotations; a DataError if they are not here or lack classes."""
    if not spec.json_file.is_file():
        advice = f"{spec.json_file} not found; {path_advice([spec.json_file])}"
        raise _fault(name, "a test set that is on this machine", advice)
    file = read_annotation_file(spec.json_file)
    wanted = sorted(spec.category_ids or file.categories)
    if lacking := [str(i) for i in wanted if i not in file.categories]:
        advice = f"{spec.json_file} lacks the categories {', '.join(lacking)}"
        raise _fault(name, "an annotation file with all of its classes", advice)
    if not len(file.image_ids):
        raise _fault(name, "a test set with images", f"{spec.json_file} lists none")
    return EvaluationSet(name, file, spec.image_root, tuple(wanted))


def read_detections(
    run: Run, read_set: Callable[[str, DatasetSpec], EvaluationSet] = read_evaluation_set
) -> RunDetections:
    """Read the detections of a run's last evaluation; ``read_set`` reads its test set.

    Raises:
        DataError: if they or the ground truth are missing, broken, or do not belong together.
    """
    name = run.test_set
    if run.folder is None or not name:
        raise _fault(run.name, "a run with DATASETS.TEST", "its test set is not known")
    path = _results_file(run.folder, name)
    dataset = read_set(name, evaluation_spec(name, run.settings))
    results = _read_results(path)
    image_ids = dataset.file.image_ids
    unknown = results.image_ids[~np.isin(results.image_ids, image_ids)]
    if len(unknown):
        advice = f"image {unknown[0]} is not in {dataset.file.path}; set {ROOT_VARIABLE} as then"
        raise _fault(str(path), f"detections on images of {name}", advice)
    detections = results.detections(np.array(dataset.category_ids), image_ids)
    return RunDetections(dataset, detections, run.max_dets)


def _results_file(folder: Path, dataset: str) -> Path:
    """Return the detections of the last evaluation, where any of the engines writes them."""
    inference = folder / INFERENCE_FOLDER
    for part in (".", dataset, f"default/final/{dataset}"):
        if (inference / part / RESULTS_FILE).is_file():
            return inference / part / RESULTS_FILE
    raise _fault(str(inference), f"a folder with {RESULTS_FILE}", "evaluate the run")


def _read_results(path: Path) -> CocoResults:
    try:
        results = CocoResults.from_entries(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise _fault(str(path), "a readable file", f"{error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _fault(str(path), "detections in COCO's results format", "evaluate again") from error
    if not (np.isfinite(results.boxes).all() and np.isfinite(results.scores).all()):
        raise _fault(str(path), "detections that are finite numbers", "evaluate again")
    return results


def _fault(value: str, allowed: str, advice: str) -> DataError:
    return DataError([Fault("detections", value, allowed, advice)])
