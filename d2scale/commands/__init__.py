"""One module a command: its arguments and its printing. The work is done elsewhere."""

from __future__ import annotations

from importlib.metadata import entry_points
from typing import Any

from d2scale.commands import benchmark, doctor, memory, plan, report, train, visualize


def all_commands() -> list[Any]:
    """Return the modules of d2scale's commands and of the projects', in the help's order."""
    projects = [entry.load() for entry in entry_points(group="d2scale.commands")]
    return [plan, memory, train, *projects, report, visualize, benchmark, doctor]
