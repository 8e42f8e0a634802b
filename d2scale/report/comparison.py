"""Which runs may be compared, and what tells them apart beyond the noise of the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from d2scale.coco.accumulate import METRICS
from d2scale.errors import DataError
from d2scale.report.detections import Detected, GroundTruths, max_dets_of, read_detected
from d2scale.report.noise import Noise, bootstrap
from d2scale.report.published import Publication
from d2scale.report.runs import Run

# Results are told with three digits; what differs by more is of another evaluation.
_SAME_RESULT = 0.01


@dataclass(frozen=True)
class Judged:
    """A run with what its own detections say.

    Attributes:
        run: the run.
        detected: its detections; None if they or their ground truth are missing.
        noise: of its results; None without detections.
        results: what the run told, else what its detections give, percent by column.
        class_results: the same for each class.
    """

    run: Run
    detected: Detected | None = None
    noise: Noise | None = None
    results: Mapping[str, float] = field(default_factory=dict)
    class_results: Mapping[str, float] = field(default_factory=dict)

    @property
    def test_set(self) -> str:
        """Name of the test set; empty if it is not known."""
        return self.run.test_set

    @property
    def classes(self) -> frozenset[str]:
        """Classes that were evaluated; empty if they are not known."""
        if self.detected is not None:
            return frozenset(self.detected.truth.class_names)
        return frozenset(self.class_results)

    @property
    def max_dets(self) -> int:
        """Best detections of an image that count."""
        return max_dets_of(self.run)

    @property
    def images(self) -> int | None:
        """How many images the test set has; None if it is not known."""
        return None if self.detected is None else self.detected.truth.images


def judge(runs: Sequence[Run], notes: list[str]) -> list[Judged]:
    """Read and resample the detections of each run; what is missing goes into ``notes``."""
    truths = GroundTruths()
    return [_judge(run, truths, notes) for run in runs]


def _judge(run: Run, truths: GroundTruths, notes: list[str]) -> Judged:
    told = Judged(run, results=run.results, class_results=run.class_results)
    if not run.results and not run.folder:
        return told
    try:
        detected = read_detected(run, truths)
    except DataError as error:
        reason = "; ".join(str(fault) for fault in error.faults)
        notes.append(f"{run.name}: no noise and no example detections: {reason}")
        return told
    noise = bootstrap(detected)
    for name in METRICS:
        exact, own = noise.exact[name], run.results.get(name, math.nan)
        if math.isfinite(own) and not abs(exact - own) < _SAME_RESULT:
            notes.append(
                f"{run.name}: its detections give {name} {exact:.3f} where the run told "
                f"{own:.3f}, so they or the ground truth are not those of its last evaluation: "
                "no noise and no example detections"
            )
            return told
    if not run.results:
        notes.append(f"{run.name}: it told no results; they are computed from its detections")
    by_class = {n.removeprefix("AP-"): v for n, v in noise.exact.items() if n.startswith("AP-")}
    return Judged(run, detected, noise, {**noise.exact, **_finite(run.results)}, by_class)


def _finite(values: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if math.isfinite(value)}


def groups(judged: Sequence[Judged]) -> list[list[Judged]]:
    """Put runs together that were tested on the same images and classes, in order."""
    found: list[list[Judged]] = []
    for each in judged:
        for group in found:
            if not difference_of_tests(group[0], each):
                group.append(each)
                break
        else:
            found.append([each])
    return found


def difference_of_tests(one: Judged, other: Judged) -> str:
    """Return why the results of two runs cannot be compared; empty if they can."""
    if not one.results or not other.results:
        return "one of them has no results"
    if not one.test_set or not other.test_set:
        return "a test set is not known"
    if one.test_set != other.test_set:
        return f"one was tested on {one.test_set}, the other on {other.test_set}"
    if one.classes and other.classes and one.classes != other.classes:
        return f"one has {len(one.classes)} classes, the other {len(other.classes)} or others"
    if one.max_dets != other.max_dets:
        return (
            f"one counts the {one.max_dets} best detections of an image, the other the "
            f"{other.max_dets} best"
        )
    return ""


def difference_to_published(judged: Judged, publication: Publication) -> str:
    """Return why a run cannot be compared with published ones; empty if it can."""
    reference = Judged(
        publication.runs[0],
        results=publication.runs[0].results,
        class_results=publication.runs[0].class_results,
    )
    if reason := difference_of_tests(judged, reference):
        return reason.replace("one ", "the run ", 1).replace("the other", "the published", 1)
    if judged.images is None:
        return "how many images the run was tested on is not known here"
    if judged.images != publication.test_images:
        return (
            f"the run was tested on {judged.images} images, the published ones on "
            f"{publication.test_images}"
        )
    return ""


def nearest_published(run: Run, publication: Publication) -> Run:
    """Return the published run of the nearest total batch and number of GPUs."""

    def distance(other: Run) -> tuple[float, int]:
        batch = abs(math.log((run.ims_per_batch or 1) / (other.ims_per_batch or 1)))
        return batch, abs((run.world_size or 0) - (other.world_size or 0))

    return min(publication.runs, key=distance)


@dataclass(frozen=True)
class Difference:
    """A result minus another.

    Attributes:
        title: what is subtracted from what.
        values: by column, percent.
        bands: what the difference becomes on other images; empty without detections.
        beyond_noise: columns whose band does not hold 0.
    """

    title: str
    values: Mapping[str, float]
    bands: Mapping[str, tuple[float, float]]

    @property
    def beyond_noise(self) -> frozenset[str]:
        """Columns that differ by more than the images explain."""
        return frozenset(name for name, (low, high) in self.bands.items() if low * high > 0)


def difference_of_runs(one: Judged, first: Judged) -> Difference:
    """Return ``one`` minus ``first``, tested on the same images."""
    values = _subtract(one.results, first.results)
    bands = {}
    if one.noise is not None and first.noise is not None:
        for name in METRICS:
            band = one.noise.difference(first.noise, name)
            if band is not None:
                bands[name] = band
    return Difference(f"{one.run.name} minus {first.run.name}", values, bands)


def difference_of_published(one: Judged, published: Run) -> Difference:
    """Return ``one`` minus a published run, within the noise of ``one`` alone."""
    values = _subtract(one.results, published.results)
    bands = {}
    for name, value in values.items():
        band = one.noise.band(name) if one.noise is not None else None
        if band is not None:
            exact = one.results[name]
            bands[name] = (value + band[0] - exact, value + band[1] - exact)
    return Difference(f"{one.run.name} minus {published.name}", values, bands)


def _subtract(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {
        name: one[name] - other[name]
        for name in METRICS
        if math.isfinite(one.get(name, math.nan)) and math.isfinite(other.get(name, math.nan))
    }
