"""``d2scale doctor``: show what can run here."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from d2scale.commands.common import add_command

if TYPE_CHECKING:
    from d2scale.commands.common import Commands


def add_parser(commands: Commands) -> None:
    """Add ``d2scale doctor``."""
    parser = add_command(commands, "doctor", "show versions, devices, and what can run here")
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run ``d2scale doctor``."""
    from d2scale.doctor import diagnose

    print(diagnose())
    return 0
