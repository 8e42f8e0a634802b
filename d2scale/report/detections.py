"""A run's own detections, and the boxes that they should have found."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from d2scale.coco.annotation_file import AnnotationFile, read_annotation_file
from d2scale.coco.catalog import ROOT_VARIABLE, dataset_names, dataset_spec, datasets_root
from d2scale.coco.matching import Detections as Found
from d2scale.coco.matching import GroundTruth as Truth
from d2scale.coco.matching import numbers_of
from d2scale.coco.results import CocoResults
from d2scale.errors import DataError, Fault
from d2scale.report.runs import Run, whole_number
from d2scale.run_folder.files import INFERENCE_FOLDER, RESULTS_FILE

_OFFICIAL_MAX_DETS = 100


@dataclass(frozen=True)
class GroundTruth:
    """A test set as its annotation file has it. Needs no images.

    Attributes:
        name: as in ``DATASETS.TEST``.
        file: the annotations.
        image_root: where the images lie.
        category_ids: of the classes that count, ascending.
    """

    name: str
    file: AnnotationFile
    image_root: Path
    category_ids: tuple[int, ...]

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names, in the order of ``category_ids``."""
        return tuple(self.file.categories[each] for each in self.category_ids)

    @property
    def images(self) -> int:
        """How many images there are."""
        return len(self.file.image_ids)

    @cached_property
    def boxes(self) -> Truth:
        """The boxes of the classes that count, images and classes by number."""
        file = self.file
        classes = numbers_of(file.category_ids, np.array(self.category_ids))
        truth = Truth(
            file.annotation_ids, file.image_numbers, classes, file.boxes, file.areas, file.crowds
        )
        return truth.take(np.flatnonzero((classes >= 0) & (file.image_numbers >= 0)))

    def objects_of(self, number: int) -> Truth:
        """Return the boxes of one image that should be found."""
        boxes = self.boxes
        return boxes.take(np.flatnonzero((boxes.images == number) & ~boxes.crowds))


@dataclass(frozen=True)
class Detected:
    """What a run detected on its test set.

    Attributes:
        truth: the test set.
        found: detections of its classes, images and classes by number as in ``truth``.
        max_dets: best detections of an image that count.
    """

    truth: GroundTruth
    found: Found
    max_dets: int


class GroundTruths:
    """Reads each test set once.

    Raises:
        DataError: from its method, if a test set is not known or not there.
    """

    def __init__(self) -> None:
        self._read: dict[str, GroundTruth] = {}

    def of(self, name: str) -> GroundTruth:
        """Return the ground truth of a dataset's name."""
        if name not in self._read:
            self._read[name] = _read_truth(name)
        return self._read[name]


def _read_truth(name: str) -> GroundTruth:
    if name not in dataset_names():
        raise _fault(name, "a test set that d2scale knows", "its ground truth is not known here")
    spec = dataset_spec(name)
    if not spec.json_file.is_file():
        advice = (
            f"{spec.json_file} not found; set {ROOT_VARIABLE} to the folder that the run used "
            f"(now {datasets_root()})"
        )
        raise _fault(name, "a test set that is on this machine", advice)
    file = read_annotation_file(spec.json_file)
    wanted = spec.category_ids or tuple(file.categories)
    lacking = [str(each) for each in wanted if each not in file.categories]
    if lacking:
        advice = f"{spec.json_file} lacks the categories {', '.join(lacking)}"
        raise _fault(name, "an annotation file with all of its classes", advice)
    return GroundTruth(name, file, spec.image_root, tuple(sorted(wanted)))


def read_detected(run: Run, truths: GroundTruths) -> Detected:
    """Read the detections of a run's last evaluation.

    Raises:
        DataError: if they or the ground truth are missing, broken, or do not belong together.
    """
    name = run.test_set
    if run.folder is None or not name:
        raise _fault(run.name, "a run with DATASETS.TEST", "its test set is not known")
    path = _results_file(run.folder, name)
    truth = truths.of(name)
    results = _read_results(path)
    images = numbers_of(results.image_ids, truth.file.image_ids)
    if (images < 0).any():
        strange = int(results.image_ids[images < 0][0])
        advice = f"image {strange} is not in {truth.file.path}; set {ROOT_VARIABLE} as the run had"
        raise _fault(str(path), f"detections on images of {name}", advice)
    classes = numbers_of(results.category_ids, np.array(truth.category_ids))
    found = Found(images, classes, results.boxes, results.scores)
    return Detected(truth, found.take(np.flatnonzero(classes >= 0)), max_dets_of(run))


def max_dets_of(run: Run) -> int:
    """Return how many of an image's detections count in a run's metric."""
    limit = whole_number(run.settings.get("TEST.DETECTIONS_PER_IMAGE"))
    # d2scale's is the only metric that follows this key.
    return limit if limit and run.engine == "d2scale" else _OFFICIAL_MAX_DETS


def _results_file(folder: Path, dataset: str) -> Path:
    """Return the file of the last evaluation, where any of the engines puts it."""
    inference = folder / INFERENCE_FOLDER
    for path in (
        inference / RESULTS_FILE,
        inference / dataset / RESULTS_FILE,
        inference / "default" / "final" / dataset / RESULTS_FILE,
    ):
        if path.is_file():
            return path
    raise _fault(str(inference), f"a folder with {RESULTS_FILE}", "evaluate the run")


def _read_results(path: Path) -> CocoResults:
    try:
        results = CocoResults.from_entries(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise _fault(str(path), "a readable file", f"{error.strerror}") from error
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise _fault(str(path), "detections in COCO's results format", "evaluate anew") from error
    if not (np.isfinite(results.boxes).all() and np.isfinite(results.scores).all()):
        raise _fault(str(path), "detections that are finite numbers", "evaluate anew")
    return results


def _fault(value: str, allowed: str, advice: str) -> DataError:
    return DataError([Fault("detections", value, allowed, advice)])
