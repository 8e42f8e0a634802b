"""From run folders to a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path

from d2scale.errors import DataError, Fault
from d2scale.report.comparison import comparable_groups, evaluate_runs
from d2scale.report.curves import draw_curves, draw_overview
from d2scale.report.document import Document, Section
from d2scale.report.examples import examples_section
from d2scale.report.output import ReportFiles, check_output, picture_folder, write_files
from d2scale.report.page import to_html, to_markdown
from d2scale.report.published import Publication, read_published
from d2scale.report.result_tables import results_section, summary_lines
from d2scale.report.runs import Run, read_run
from d2scale.report.training_tables import settings_section, throughput_section

_CURVES = (
    "Thin: as reported. Thick: the mean over a twentieth of the axis. Different batch sizes line "
    "up against images seen only."
)
_NO_CURVES = "No run has any curve."
_BY_GAIN = (
    "A run by the gain rule counts its recipe's iterations, and lines up with the recipe against "
    "those; it shows more images where its batch is larger."
)
_NOISE_SCALE = (
    "Noise scale: the images at which the noise of a step's gradient equals its signal. For "
    "batches well below it twice the images are worth nearly two steps, for batches well above it "
    "hardly more than one. It is missing where it was infinite, or a step had one part only."
)


def write_report(
    run_folders: Sequence[Path], output: Path, *, published: bool = False
) -> ReportFiles:
    """Compare runs in one HTML page, with pictures beside it and Markdown for a pull request.

    Args:
        run_folders: of d2scale, detectron2 or d2go. The others are compared with the first.
        output: the page, ``*.html``. ``*.md`` and the folder ``*_files`` come beside it.

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
    """Read the runs with metrics or results, under unique names; a DataError if there is none."""
    if absent := [folder for folder in folders if not folder.is_dir()]:
        allowed = "the folder of a run"
        raise DataError([Fault("RUN", str(path), allowed, "check the path") for path in absent])
    folders = list({folder.resolve(): folder for folder in folders}.values())
    runs, notes = [], []
    for run in map(read_run, folders, _names(folders)):
        if run.history.rows or run.results:
            runs.append(run)
            notes += [f"{run.name}: {note}" for note in run.notes]
        else:
            notes.append(f"{run.folder} is skipped: it has neither metrics nor results")
    if not runs:
        allowed = "a folder with metrics.json, TensorBoard events or results in log.txt"
        advice = "check that it is a run's folder, and that the run has begun to report"
        raise DataError([Fault("RUN", str(folder), allowed, advice) for folder in folders])
    return runs, notes


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as few as make them unique."""
    paths = [folder.resolve().parts for folder in folders]
    candidates = (["/".join(parts[-length:]) for parts in paths] for length in count(1))
    return next(names for names in candidates if len(set(names)) == len(names))


def make_document(
    runs: Sequence[Run], publications: Sequence[Publication], notes: Sequence[str] = ()
) -> Document:
    """Return the content of the report of these runs."""
    notes = list(notes)
    evaluated = evaluate_runs(runs, notes)
    curves = draw_curves(runs)
    sections = [
        results_section(evaluated, publications),
        Section("Curves", _about_curves(runs) if curves else (_NO_CURVES,), pictures=curves),
        throughput_section(runs, publications),
        settings_section(runs, publications),
        *(examples_section(group, notes) for group in comparable_groups(evaluated)),
    ]
    return Document(
        title=", ".join(run.name for run in runs),
        summary=summary_lines(evaluated),
        sections=tuple(section for section in sections if section is not None),
        notes=tuple(notes),
        overview=draw_overview(runs),
    )


def _about_curves(runs: Sequence[Run]) -> tuple[str, ...]:
    by_gain = any(run.follows_gain for run in runs)
    noise = any(run.history.last("noise_scale") is not None for run in runs)
    return (_CURVES, *[_BY_GAIN] * by_gain, *[_NOISE_SCALE] * noise)


def _pictures(document: Document) -> dict[str, bytes]:
    """Return every picture by its file's name; only the overview has one for dark pages too."""
    pictures = [picture for section in document.sections for picture in section.pictures]
    # A run's name must not lead out of the folder.
    names = [re.sub(r"[^A-Za-z0-9_.-]", "_", picture.name).lstrip(".") for picture in pictures]
    files = {name: picture.light for name, picture in zip(names, pictures, strict=True)}
    if document.overview is not None:
        files[document.overview.name] = document.overview.light
        files[f"dark-{document.overview.name}"] = document.overview.dark
    return files
