"""Results of runs: summary, published columns, differences, AP of each class."""

from __future__ import annotations

from collections.abc import Sequence

from d2scale.coco.accumulate import METRICS
from d2scale.report.comparison import (
    Difference,
    EvaluatedRun,
    as_reported,
    comparable_groups,
    difference_of_runs,
    difference_to_published,
    nearest_published,
    why_not_comparable_to_published,
)
from d2scale.report.document import Cell, Section, Table
from d2scale.report.formatting import NOTHING, join_names, show_count, show_metric
from d2scale.report.noise import COVERAGE, RESAMPLES
from d2scale.report.published import Publication
from d2scale.report.training_tables import time_saved

_NOT_NOISE = (
    "The noise meant here is the choice of the test images. Training again, even if only rounding "
    "differs, moves results as well; a single run cannot tell how much."
)
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
    "Under each difference to a published run: its range by the noise of the own run alone, "
    "because the published detections are not known. Bold: 0 lies outside."
)


def summary_lines(runs: Sequence[EvaluatedRun]) -> tuple[str, ...]:
    """Return one line a run: AP, its difference to the first comparable run, and time saved."""
    first_of = {run.run.name: group[0] for group in comparable_groups(runs) for run in group}
    lines = []
    for run in runs:
        name = run.run.name
        if "AP" not in run.results:
            lines.append(f"{name}: no results of an evaluation.")
            continue
        text = f"{name}: AP {run.results['AP']:.3f}"
        if half_width := run.half_width("AP"):
            text += f" ± {half_width:.2f}"
        text += _difference_to(first_of[name], run) if first_of[name] is not run else ""
        if (saved := time_saved(run.run, runs[0].run)) is not None:
            less = "less" if saved > 0 else "more"
            text += f"; {abs(saved):.0%} {less} time than {runs[0].run.name}"
        if efficiency := run.run.efficiency:
            steps = f"{show_count(run.run.steps)} steps of {run.run.ims_per_batch} images"
            worth = f"each image worth {efficiency:.2f} of one in the recipe's batch"
            text += f"; by the gain rule {steps}, {worth}"
        lines.append(f"{text}.")
    if len(runs) > 1 and any(run.noise is not None for run in runs):
        lines.append(_NOT_NOISE)
    return tuple(lines)


def _difference_to(first: EvaluatedRun, run: EvaluatedRun) -> str:
    difference = difference_of_runs(run, first)
    if "AP" not in difference.values:
        return ""
    text = f", {difference.values['AP']:+.3f} against {first.run.name}"
    if "AP" not in difference.bands:
        return f"{text} (how much of it is noise is not known)"
    how = "more than" if "AP" in difference.beyond_noise else "within"
    return f"{text} ({how} the noise of the images)"


def results_section(runs: Sequence[EvaluatedRun], publications: Sequence[Publication]) -> Section:
    """Return results, differences where runs are comparable, and AP of each class."""
    published = [as_reported(run) for publication in publications for run in publication.runs]
    groups = comparable_groups(runs)
    paragraphs = []
    if len(groups) > 1:
        named = [(", ".join(run.run.name for run in group), _test(group[0])) for group in groups]
        parts = "; ".join(f"{names} ({test})" for names, test in named)
        paragraphs.append(
            "These runs were not tested on the same images and classes, so they are compared "
            f"within groups only: {parts}."
        )
    pairs = [(run, group[0]) for group in groups if group[0].results for run in group[1:]]
    differences = [difference_of_runs(run, first) for run, first in pairs]
    tables = [_results_table(runs, published)]
    tables += _difference_tables("Differences between the runs", differences, _BOLD)
    for publication in publications:
        tables += _to_published(runs, publication, paragraphs)
    tables.append(_class_table(runs, published))
    return Section("Results", tuple(paragraphs), tuple(tables))


def _test(run: EvaluatedRun) -> str:
    parts = [run.run.test_set or "unknown test set"]
    if run.images is not None:
        parts.append(f"{run.images} images")
    if run.classes:
        parts.append(f"{len(run.classes)} classes")
    return ", ".join(parts) if run.results else "no results"


def _results_table(runs: Sequence[EvaluatedRun], published: Sequence[EvaluatedRun]) -> Table:
    rows = tuple(
        (Cell(run.run.name), *(_value(run, name) for name in METRICS))
        for run in (*runs, *published)
    )
    notes = ["Percent, by the official COCO metric."]
    if any(run.noise is not None for run in runs):
        notes.append(_NOISE)
    tests = join_names((_test(run), run.run.name) for run in runs)
    notes += [f"{names}: {test}." for test, names in tests.items()]
    return Table("Results in the published columns", ("", *METRICS), rows, tuple(notes))


def _value(run: EvaluatedRun, name: str) -> Cell:
    of_class = name.startswith("AP-")
    values = run.class_results if of_class else run.results
    half_width, digits = run.half_width(name), 1 if of_class else 2
    noise = "" if half_width is None else f"±{half_width:.{digits}f}"
    return Cell(show_metric(values.get(name.removeprefix("AP-"))), noise)


def _difference_tables(title: str, differences: Sequence[Difference], note: str) -> list[Table]:
    """Return a table of the differences, if there are any."""
    rows = tuple(
        (Cell(difference.title), *(_difference(difference, name) for name in METRICS))
        for difference in differences
    )
    notes = (note,) if any(difference.bands for difference in differences) else ()
    return [Table(title, ("", *METRICS), rows, notes)] if rows else []


def _difference(difference: Difference, name: str) -> Cell:
    text = show_metric(difference.values.get(name), "+")
    if name not in difference.bands or text == NOTHING:
        return Cell(text)
    low, high = difference.bands[name]
    return Cell(text, f"{low:+.2f} to {high:+.2f}", strong=name in difference.beyond_noise)


def _to_published(
    runs: Sequence[EvaluatedRun], publication: Publication, paragraphs: list[str]
) -> list[Table]:
    """Return a table of the comparable runs; add to ``paragraphs`` why others are not."""
    differences, reasons = [], []
    for run in runs:
        if reason := why_not_comparable_to_published(run, publication):
            reasons.append((reason, run.run.name))
        else:
            published = nearest_published(run.run, publication)
            differences.append(difference_to_published(run, published))
    paragraphs += [
        f"Not comparable with the published runs: {names}: {reason}. The published "
        "numbers are shown for reference only."
        for reason, names in join_names(reasons).items()
    ]
    title = "Differences to the published run of the nearest batch and number of GPUs"
    return _difference_tables(title, differences, _BOLD_PUBLISHED)


def _class_table(runs: Sequence[EvaluatedRun], published: Sequence[EvaluatedRun]) -> Table:
    columns = (*runs, *published)
    names = dict.fromkeys(name for run in runs for name in run.class_results)
    names = names or dict.fromkeys(name for run in published for name in run.class_results)
    rows = tuple((Cell(name), *(_value(run, f"AP-{name}") for run in columns)) for name in names)
    head = ("", *(run.run.name for run in columns))
    return Table("AP of each class", head, rows, folded=True, in_markdown=False)
