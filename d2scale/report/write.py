"""From run folders to a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from d2scale.errors import DataError, Fault
from d2scale.report.comparison import (
    EvaluatedRun,
    comparable_groups,
    difference_of_runs,
    evaluate_runs,
)
from d2scale.report.curves import draw_curves, draw_overview
from d2scale.report.document import Document, Section
from d2scale.report.examples import examples_section
from d2scale.report.output import ReportFiles, check_output, picture_folder, write_files
from d2scale.report.page import to_html, to_markdown
from d2scale.report.published import Publication, read_published
from d2scale.report.result_tables import results_section
from d2scale.report.runs import Run, read_run
from d2scale.report.training_tables import settings_section, throughput_section, time_saved

_NOISE = (
    "The noise meant here is the choice of the test images. Training again, even if only rounding "
    "differs, moves results as well; a single run cannot tell how much."
)
_CURVES = (
    "Thin: as reported. Thick: the mean over a twentieth of the axis. Different batch sizes line "
    "up against images seen only."
)


def write_report(
    run_folders: Sequence[Path], output: Path, *, published: bool = False
) -> ReportFiles:
    """Compare runs in one HTML page, with pictures beside it and Markdown for a pull request.

    Args:
        run_folders: of d2scale, detectron2 or d2go. The others are compared with the first.
        output: the page, ``*.html``. ``*.md`` and the folder ``*_files`` come beside it.
        published: compare with the published runs that installed projects bring.

    Raises:
        DataError: if a folder is not there, no run has metrics or results, or published runs are
            missing.
        ConfigError: if the report cannot be written; an older one is still there, whole.
    """
    output = Path(output)
    check_output(output)
    publications = read_published() if published else ()
    runs, notes = read_runs([Path(folder) for folder in run_folders])
    document = make_document(runs, publications, notes)
    markdown = to_markdown(document, picture_folder(output).name)
    files = write_files(output, to_html(document), markdown, _pictures(document))
    return replace(files, notes=document.notes)


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the runs that have metrics or results, under unique names, and note the others.

    Raises:
        DataError: if a folder is not there, or no run is left.
    """
    if absent := [folder for folder in folders if not folder.is_dir()]:
        allowed = "the folder of a run"
        raise DataError([Fault("RUN", str(path), allowed, "check the path") for path in absent])
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs, notes = [], []
    for folder, name in zip(folders, _names(folders), strict=True):
        run = read_run(folder, name)
        if run.history.rows or run.results:
            runs.append(run)
            notes += [f"{name}: {note}" for note in run.notes]
        else:
            notes.append(f"{folder} is skipped: it has neither metrics nor results")
    if not runs:
        allowed = "a folder with metrics.json, TensorBoard events or results in log.txt"
        advice = "check that it is a run's folder, and that the run has begun to report"
        raise DataError([Fault("RUN", str(folder), allowed, advice) for folder in folders])
    return runs, notes


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as few as make them unique."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return []


def make_document(
    runs: Sequence[Run], publications: Sequence[Publication], notes: Sequence[str] = ()
) -> Document:
    """Return the content of the report of these runs."""
    notes = list(notes)
    evaluated = evaluate_runs(runs, notes)
    curves = draw_curves(runs)
    sections = [
        results_section(evaluated, publications),
        Section("Curves", (_CURVES if curves else "No run has any curve.",), pictures=curves),
        throughput_section(runs, publications),
        settings_section(runs, publications),
        *(examples_section(group, notes) for group in comparable_groups(evaluated)),
    ]
    return Document(
        title=", ".join(run.name for run in runs),
        summary=_summary(evaluated),
        sections=tuple(section for section in sections if section is not None),
        notes=tuple(notes),
        overview=draw_overview(runs),
    )


def _summary(runs: Sequence[EvaluatedRun]) -> tuple[str, ...]:
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
        saved = time_saved(run.run, runs[0].run)
        if saved is not None:
            less = "less" if saved > 0 else "more"
            text += f"; {abs(saved):.0%} {less} time than {runs[0].run.name}"
        lines.append(f"{text}.")
    if len(runs) > 1 and any(run.noise is not None for run in runs):
        lines.append(_NOISE)
    return tuple(lines)


def _difference_to(first: EvaluatedRun, run: EvaluatedRun) -> str:
    difference = difference_of_runs(run, first)
    if "AP" not in difference.values:
        return ""
    text = f", {difference.values['AP']:+.3f} against {first.run.name}"
    if "AP" not in difference.bands:
        return f"{text} (how much of it is noise is not known)"
    if "AP" in difference.beyond_noise:
        return f"{text} (more than the noise of the images)"
    return f"{text} (within the noise of the images)"


def _pictures(document: Document) -> dict[str, bytes]:
    """Return every picture by its file's name; only the overview has one for dark pages too."""
    pictures = [picture for section in document.sections for picture in section.pictures]
    files = {_file_name(picture.name): picture.light for picture in pictures}
    if document.overview is not None:
        files[document.overview.name] = document.overview.light
        files[f"dark-{document.overview.name}"] = document.overview.dark
    return files


def _file_name(name: str) -> str:
    """Keep a run's name from leaving the folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")
