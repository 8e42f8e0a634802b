"""From run folders to a report."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from d2scale.errors import DataError, Fault
from d2scale.report.comparison import Judged, difference_of_runs, groups, judge
from d2scale.report.curves import draw_curves, draw_overview
from d2scale.report.document import Document, Section
from d2scale.report.examples import examples_section
from d2scale.report.output import ReportFiles, check_output, picture_folder, write_files
from d2scale.report.page import to_html, to_markdown
from d2scale.report.published import Publication, read_published
from d2scale.report.results import results_section
from d2scale.report.runs import Run, read_run
from d2scale.report.tables import settings_section, throughput_section, time_saved

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
        run_folders: of d2scale, detectron2 or d2go. The first is what others are compared with.
        output: the page, ``*.html``. ``*.md`` and the folder ``*_files`` come beside it.
        published: compare with the published runs that installed projects bring.

    Raises:
        DataError: if a folder is not there, no run tells anything, or published runs are missing.
        ConfigError: if the report cannot be written; nothing is left half-written.
    """
    output = Path(output)
    check_output(output)
    publications = read_published() if published else ()
    runs, notes = read_runs([Path(folder) for folder in run_folders])
    document = make_document(runs, publications, notes)
    folder = picture_folder(output).name
    files = write_files(
        output, to_html(document), to_markdown(document, folder), _pictures(document)
    )
    return replace(files, notes=document.notes)


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[str]]:
    """Read the runs that tell anything, under names that differ, and say which do not.

    Raises:
        DataError: if a folder is not there, or no run is left.
    """
    absent = [folder for folder in folders if not folder.is_dir()]
    if absent:
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
            notes.append(f"{folder} is skipped: it tells neither metrics nor results")
    if not runs:
        allowed = "a folder with metrics.json, TensorBoard events or results in log.txt"
        advice = "check that it is a run's folder, and that the run has begun to report"
        raise DataError([Fault("RUN", str(folder), allowed, advice) for folder in folders])
    return runs, notes


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the last parts of the paths, as few as tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return []


def make_document(
    runs: Sequence[Run], publications: Sequence[Publication], notes: Sequence[str] = ()
) -> Document:
    """Return what the report of these runs consists of."""
    notes = list(notes)
    judged = judge(runs, notes)
    sections = [
        results_section(judged, publications),
        _curves_section(runs),
        throughput_section(runs, publications),
        settings_section(runs, publications),
    ]
    examples = [examples_section(group, notes) for group in groups(judged)]
    overview = draw_overview(runs)
    return Document(
        title=", ".join(run.name for run in runs),
        summary=_summary(judged),
        sections=(*sections, *(section for section in examples if section is not None)),
        notes=tuple(notes),
        overview=overview[0] if overview else None,
    )


def _curves_section(runs: Sequence[Run]) -> Section:
    pictures = draw_curves(runs)
    text = _CURVES if pictures else "No run tells any curve."
    return Section("Curves", (text,), pictures=pictures)


def _summary(judged: Sequence[Judged]) -> tuple[str, ...]:
    """Return one line a run: AP, and what became of it against the first run of its tests."""
    first_of = {id(each): group[0] for group in groups(judged) for each in group}
    lines = []
    for each in judged:
        first, lead = first_of[id(each)], f"{each.run.name}: "
        if "AP" not in each.results:
            lines.append(f"{lead}no results of an evaluation.")
            continue
        half = each.noise.half_width("AP") if each.noise is not None else None
        text = f"{lead}AP {each.results['AP']:.3f}" + (f" ± {half:.2f}" if half else "")
        text += _against(each, first) if first is not each else ""
        lines.append(f"{text}{_time_against(each.run, judged[0].run)}.")
    if len(judged) > 1 and any(each.noise is not None for each in judged):
        lines.append(_NOISE)
    return tuple(lines)


def _time_against(run: Run, first: Run) -> str:
    saved = time_saved(run, first)
    if saved is None:
        return ""
    return f"; {abs(saved):.0%} {'less' if saved > 0 else 'more'} time than {first.name}"


def _against(each: Judged, first: Judged) -> str:
    found = difference_of_runs(each, first)
    if "AP" not in found.values:
        return ""
    text = f", {found.values['AP']:+.3f} against {first.run.name}"
    if "AP" not in found.bands:
        return f"{text} (how much of it is noise is not known)"
    if "AP" in found.beyond_noise:
        return f"{text} (more than the noise of the images)"
    return f"{text} (within the noise of the images)"


def _pictures(document: Document) -> dict[str, bytes]:
    """Return every picture by its file's name; those for dark pages for the overview alone."""
    pictures = [picture for section in document.sections for picture in section.pictures]
    found: dict[str, bytes] = {}
    for picture in pictures:
        found[_file_name(picture.name)] = picture.light
    if document.overview is not None:
        found[document.overview.name] = document.overview.light
        found[f"dark-{document.overview.name}"] = document.overview.dark
    return found


def _file_name(name: str) -> str:
    """Keep a run's name from leaving the folder."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", name).lstrip(".")
