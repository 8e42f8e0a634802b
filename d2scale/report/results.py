"""The tables of results: published columns, differences, AP of each class."""

from __future__ import annotations

from collections.abc import Sequence

from d2scale.coco.accumulate import METRICS
from d2scale.report.columns import NOTHING, show_difference, show_metric
from d2scale.report.comparison import (
    Difference,
    Judged,
    difference_of_published,
    difference_of_runs,
    difference_to_published,
    groups,
    nearest_published,
)
from d2scale.report.document import Cell, Section, Table
from d2scale.report.noise import COVERAGE, RESAMPLES
from d2scale.report.published import Publication

_NOISE = (
    f"±: half of the range that holds {COVERAGE:.0%} of {RESAMPLES} resamples of the test images. "
    "It says how far a value would move on other images of the same kind, and nothing about "
    "training again with another seed."
)
_BOLD = (
    "Under each difference: the range of it over the same resamples of the images for both runs. "
    "Bold: 0 lies outside."
)
_BOLD_PUBLISHED = (
    "Under each difference to a published run: the range that the noise of the own run alone "
    "gives it, for the published detections are not known. Bold: 0 lies outside."
)


def results_section(judged: Sequence[Judged], publications: Sequence[Publication]) -> Section:
    """Return results, differences where runs may be compared, and AP of each class."""
    found = groups(judged)
    paragraphs = []
    if len(found) > 1:
        parts = "; ".join(
            f"{', '.join(each.run.name for each in group)} ({_test(group[0])})" for group in found
        )
        paragraphs.append(
            "These runs were not tested on the same images and classes, so they are compared "
            f"within groups only: {parts}."
        )
    tables = [_results_table(judged, publications)]
    differences = [
        difference_of_runs(each, group[0])
        for group in found
        if group[0].results
        for each in group[1:]
    ]
    if differences:
        notes = (_BOLD,) if any(each.bands for each in differences) else ()
        tables.append(_difference_table("Differences between the runs", differences, notes))
    for publication in publications:
        text, table = _to_published(judged, publication)
        paragraphs += text
        tables += table
    tables.append(_class_table(judged, publications))
    return Section("Results", tuple(paragraphs), tuple(tables))


def _test(judged: Judged) -> str:
    parts = [judged.test_set or "unknown test set"]
    if judged.images is not None:
        parts.append(f"{judged.images} images")
    if judged.classes:
        parts.append(f"{len(judged.classes)} classes")
    return ", ".join(parts) if judged.results else "no results"


def _results_table(judged: Sequence[Judged], publications: Sequence[Publication]) -> Table:
    rows = [(Cell(each.run.name), *(_metric(each, name) for name in METRICS)) for each in judged]
    for publication in publications:
        rows += [
            (Cell(run.name), *(Cell(show_metric(run.results.get(name))) for name in METRICS))
            for run in publication.runs
        ]
    notes = ["Percent, by the official COCO metric."]
    if any(each.noise is not None for each in judged):
        notes.append(_NOISE)
    tests: dict[str, list[str]] = {}
    for each in judged:
        tests.setdefault(_test(each), []).append(each.run.name)
    notes += [f"{', '.join(names)}: {test}." for test, names in tests.items()]
    return Table("Results in the published columns", ("", *METRICS), tuple(rows), tuple(notes))


def _metric(judged: Judged, name: str) -> Cell:
    half = judged.noise.half_width(name) if judged.noise is not None else None
    detail = "" if half is None else f"±{half:.2f}"
    return Cell(show_metric(judged.results.get(name)), detail)


def _difference_table(title: str, found: Sequence[Difference], notes: tuple[str, ...]) -> Table:
    rows = tuple(
        (Cell(each.title), *(_difference(each, name) for name in METRICS)) for each in found
    )
    return Table(title, ("", *METRICS), rows, notes)


def _difference(found: Difference, name: str) -> Cell:
    text = show_difference(found.values.get(name))
    if name not in found.bands or text == NOTHING:
        return Cell(text)
    low, high = found.bands[name]
    return Cell(text, f"{low:+.2f} to {high:+.2f}", strong=name in found.beyond_noise)


def _to_published(
    judged: Sequence[Judged], publication: Publication
) -> tuple[list[str], list[Table]]:
    reasons: dict[str, list[str]] = {}
    differences = []
    for each in judged:
        reason = difference_to_published(each, publication)
        if reason:
            reasons.setdefault(reason, []).append(each.run.name)
        else:
            nearest = nearest_published(each.run, publication)
            differences.append(difference_of_published(each, nearest))
    paragraphs = [
        f"Not comparable with the published runs: {', '.join(names)}: {reason}. The published "
        "numbers are shown for reference only."
        for reason, names in reasons.items()
    ]
    if not differences:
        return paragraphs, []
    title = "Differences to the published run of the nearest batch and number of GPUs"
    notes = (_BOLD_PUBLISHED,) if any(each.bands for each in differences) else ()
    return paragraphs, [_difference_table(title, differences, notes)]


def _class_table(judged: Sequence[Judged], publications: Sequence[Publication]) -> Table:
    published = [run for each in publications for run in each.runs]
    names = dict.fromkeys(name for each in judged for name in each.class_results)
    if not names:
        names = dict.fromkeys(name for run in published for name in run.class_results)
    rows = tuple(
        (
            Cell(name),
            *(_class_cell(each, name) for each in judged),
            *(Cell(show_metric(run.class_results.get(name))) for run in published),
        )
        for name in names
    )
    head = ("", *(each.run.name for each in judged), *(run.name for run in published))
    return Table("AP of each class", head, rows, folded=True, in_markdown=False)


def _class_cell(judged: Judged, name: str) -> Cell:
    half = judged.noise.half_width(f"AP-{name}") if judged.noise is not None else None
    detail = "" if half is None else f"±{half:.1f}"
    return Cell(show_metric(judged.class_results.get(name)), detail)
