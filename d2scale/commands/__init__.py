"""The commands: a module for each, with its arguments and its printing."""

from __future__ import annotations

from typing import Any

from d2scale.commands import advise, benchmark, data, doctor, memory, plan, report, train, visualize
from d2scale.config.projects import entry_points


def all_commands() -> list[Any]:
    """Return the modules of all commands, the projects' among them, in the order of the help."""
    projects = [entry.load() for entry in entry_points(group="d2scale.commands")]
    return [data, plan, memory, advise, train, *projects, report, visualize, benchmark, doctor]
