"""From run folders to a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from d2scale.errors import DataError, Fault
from d2scale.report.document import Document, Section
from d2scale.report.markdown import to_markdown
from d2scale.report.output import ReportFiles, check_output, picture_folder, write_files
from d2scale.report.page import to_html
from d2scale.report.published import read_published
from d2scale.report.runs import Run, read_run
from d2scale.report.tables import class_table, results_table, settings_table, throughput_table


def write_report(
    run_folders: Sequence[Path], output: Path, *, published: bool = False
) -> ReportFiles:
    """Compare runs in one HTML page, pictures beside it and a Markdown table.

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
    everything = [*runs, *(run for each in publications for run in each.runs)]
    sections = (
        Section("Results", tables=(results_table(everything), class_table(everything))),
        Section("Settings", tables=(settings_table(everything),)),
        Section("Time and memory", tables=(throughput_table(everything),)),
    )
    notes += [f"{run.name}: {note}" for run in runs for note in run.notes]
    document = Document("Report", (), sections, tuple(notes))
    folder = picture_folder(output).name
    return write_files(output, to_html(document), to_markdown(document, folder), {})


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
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]
