"""Published runs to compare with, from data that installed projects bring."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import EntryPoint
from importlib.resources import files
from typing import Any, NamedTuple

from d2scale.config.projects import entry_points
from d2scale.errors import DataError, Fault
from d2scale.report.runs import Run

# An entry point names a package; every JSON file in it is one publication.
ENTRY_POINTS = "d2scale.published"


class Publication(NamedTuple):
    """Runs that somebody published together."""

    title: str
    source: str  # where they were published
    machine: str  # what they ran on
    test_set: str
    test_images: int
    notes: tuple[str, ...]  # what a reader must know about the numbers
    runs: tuple[Run, ...]


def read_published() -> tuple[Publication, ...]:
    """Read the publications of all installed projects; a DataError for none, or a broken one."""
    publications: list[Publication] = []
    faults: list[Fault] = []
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            publications += _read_package(entry)
        except DataError as error:
            faults += error.faults
    if not publications and not faults:
        advice = "install a project that brings them, or leave --published out"
        allowed = f"published numbers, by an entry point {ENTRY_POINTS}"
        faults.append(Fault("--published", "none installed", allowed, advice))
    if faults:
        raise DataError(faults)
    return tuple(publications)


def _read_package(entry: EntryPoint) -> list[Publication]:
    try:
        paths = [path for path in files(entry.module).iterdir() if path.name.endswith(".json")]
    except (ImportError, OSError, TypeError) as error:
        raise _error(entry.module, "a package that is installed", error) from error
    if not paths:
        raise _error(entry.module, "a package with JSON files", "it has none")
    publications = []
    for path in sorted(paths, key=lambda path: path.name):
        try:
            publications.append(parse_publication(json.loads(path.read_text(encoding="utf-8"))))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise _error(path.name, "a publication as the shipped ones", reason) from error
    return publications


def _error(value: str, allowed: str, reason: object) -> DataError:
    advice = f"install the project again ({reason})"
    return DataError([Fault("published numbers", value, allowed, advice)])


def parse_publication(content: Mapping[str, Any]) -> Publication:
    """Turn a file's content into a publication; KeyError and the like for another form."""
    settings, test_set = dict(content["settings"]), str(content["test_set"])
    return Publication(
        title=str(content["title"]),
        source=str(content["source"]),
        machine=str(content["machine"]),
        test_set=test_set,
        test_images=int(content["test_images"]),
        notes=tuple(map(str, content["notes"])),
        runs=tuple(_parse_run(run, settings, test_set) for run in content["runs"]),
    )


def _parse_run(content: Mapping[str, Any], settings: Mapping[str, Any], test_set: str) -> Run:
    return Run(
        name=f"published {content['name']}",
        folder=None,
        engine="published",
        settings={**settings, **content["settings"]},
        world_size=int(content["world_size"]),
        test_set=test_set,
        results={name: float(value) for name, value in content["results"].items()},
        class_results={name: float(value) for name, value in content["class_results"].items()},
        total_seconds=float(content["total_seconds"]),
        seconds_per_step=float(content["seconds_per_iteration"]),
    )
