"""Results of runs with their noise, which runs are comparable, and how they differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np

from d2scale.coco.accumulate import METRICS
from d2scale.errors import DataError
from d2scale.report.detections import RunDetections, read_detections, read_evaluation_set
from d2scale.report.noise import Band, Noise, bootstrap
from d2scale.report.published import Publication
from d2scale.report.runs import Run

# Percent. Logs round to three digits; a larger difference comes from another evaluation.
_SAME_RESULT = 0.01


@dataclass(frozen=True)
class EvaluatedRun:
    """A run with its results and their noise; both as far as they are known."""

    run: Run
    detected: RunDetections | None = None
    noise: Noise | None = None
    # As the run reported, else computed from its detections, percent by column.
    results: Mapping[str, float] = field(default_factory=dict)
    class_results: Mapping[str, float] = field(default_factory=dict)  # AP of each class

    @property
    def classes(self) -> frozenset[str]:
        """Classes that were evaluated; empty if they are not known."""
        names = self.class_results if self.detected is None else self.detected.dataset.class_names
        return frozenset(names)

    @property
    def images(self) -> int | None:
        """Number of test images; None if it is not known."""
        return None if self.detected is None else len(self.detected.dataset)

    def half_width(self, name: str) -> float | None:
        """Return half of the width of a column's noise band, if it is known."""
        return None if self.noise is None else self.noise.half_width(name)


def as_reported(run: Run) -> EvaluatedRun:
    """Return a run with the results that it reported, without noise."""
    return EvaluatedRun(run, results=run.results, class_results=run.class_results)


def evaluate_runs(runs: Sequence[Run], notes: list[str]) -> list[EvaluatedRun]:
    """Read and resample the detections of each run; add to ``notes`` what is missing."""
    read_set = cache(read_evaluation_set)
    evaluated = []
    for run in runs:
        try:
            evaluated.append(_evaluate(run, read_detections(run, read_set), notes))
        except DataError as error:
            reason = "; ".join(str(fault) for fault in error.faults)
            notes.append(f"{run.name}: no noise and no example detections: {reason}")
            evaluated.append(as_reported(run))
    return evaluated


def _evaluate(run: Run, detected: RunDetections, notes: list[str]) -> EvaluatedRun:
    noise = bootstrap(detected)
    reported = {name: value for name, value in run.results.items() if math.isfinite(value)}
    for name, value in reported.items():
        if not abs(noise.exact[name] - value) < _SAME_RESULT:
            notes.append(
                f"{run.name}: its detections give {name} {noise.exact[name]:.3f} where the run "
                f"reported {value:.3f}, so they or the ground truth are not those of its last "
                "evaluation: no noise and no example detections"
            )
            return as_reported(run)
    if not run.results:
        notes.append(f"{run.name}: it reported no results; they are computed from its detections")
    by_class = {n.removeprefix("AP-"): v for n, v in noise.exact.items() if n.startswith("AP-")}
    return EvaluatedRun(run, detected, noise, {**noise.exact, **reported}, by_class)


def comparable_groups(runs: Sequence[EvaluatedRun]) -> list[list[EvaluatedRun]]:
    """Group the runs that were tested on the same images and classes, in order."""
    groups: list[list[EvaluatedRun]] = []
    for run in runs:
        for group in groups:
            if not why_not_comparable(group[0], run):
                group.append(run)
                break
        else:
            groups.append([run])
    return groups


def _same_images(one: EvaluatedRun, other: EvaluatedRun) -> bool:
    """Return whether two test sets have the same images, as far as it is known."""
    if one.detected is None or other.detected is None:
        return True
    files = one.detected.dataset.file, other.detected.dataset.file
    return np.array_equal(files[0].image_ids, files[1].image_ids)


def why_not_comparable(one: EvaluatedRun, other: EvaluatedRun) -> str:
    """Return why the results of two runs cannot be compared; empty if they can."""
    if not one.results or not other.results:
        return "one of them has no results"
    if not one.run.test_set or not other.run.test_set:
        return "a test set is not known"
    if one.run.test_set != other.run.test_set:
        return f"one was tested on {one.run.test_set}, the other on {other.run.test_set}"
    if not _same_images(one, other):
        return f"their test sets, both called {one.run.test_set}, have other images"
    if one.classes and other.classes and one.classes != other.classes:
        return f"one has {len(one.classes)} classes, the other {len(other.classes)} or others"
    if one.run.max_dets != other.run.max_dets:
        return (
            f"one counts the {one.run.max_dets} best detections of an image, the other the "
            f"{other.run.max_dets} best"
        )
    return ""


def why_not_comparable_to_published(run: EvaluatedRun, publication: Publication) -> str:
    """Return why a run cannot be compared with published ones; empty if it can."""
    if reason := why_not_comparable(run, as_reported(publication.runs[0])):
        return reason.replace("one ", "the run ", 1).replace("the other", "the published", 1)
    if run.images is None:
        return "how many images the run was tested on is not known here"
    published = publication.test_images
    if run.images != published:
        return f"the run was tested on {run.images} images, the published ones on {published}"
    return ""


def nearest_published(run: Run, publication: Publication) -> Run:
    """Return the published run of the nearest total batch and number of GPUs."""

    def distance(other: Run) -> tuple[float, int]:
        batch = abs(math.log((run.ims_per_batch or 1) / (other.ims_per_batch or 1)))
        return batch, abs((run.world_size or 0) - (other.world_size or 0))

    return min(publication.runs, key=distance)


@dataclass(frozen=True)
class Difference:
    """The results of a run minus those of another, percent by column."""

    title: str
    values: Mapping[str, float]
    bands: Mapping[str, Band]  # range of the difference on other images; without detections empty

    @property
    def beyond_noise(self) -> frozenset[str]:
        """Columns that differ by more than the choice of images explains."""
        return frozenset(name for name, (low, high) in self.bands.items() if low * high > 0)


def difference_of_runs(run: EvaluatedRun, first: EvaluatedRun) -> Difference:
    """Return ``run`` minus ``first``, which must be comparable."""
    if run.noise is None or first.noise is None:
        return _difference(run, first, {})
    bands = {name: run.noise.difference(first.noise, name) for name in METRICS}
    return _difference(run, first, bands)


def difference_to_published(run: EvaluatedRun, published: Run) -> Difference:
    """Return ``run`` minus a published run, within the noise of ``run`` alone."""
    bands: dict[str, Band | None] = {}
    if run.noise is not None:
        bands = {name: run.noise.band(name, value) for name, value in published.results.items()}
    return _difference(run, as_reported(published), bands)


def _difference(
    run: EvaluatedRun, other: EvaluatedRun, bands: Mapping[str, Band | None]
) -> Difference:
    values = {n: run.results.get(n, math.nan) - other.results.get(n, math.nan) for n in METRICS}
    return Difference(
        f"{run.run.name} minus {other.run.name}",
        {name: value for name, value in values.items() if math.isfinite(value)},
        {name: band for name, band in bands.items() if band is not None},
    )
