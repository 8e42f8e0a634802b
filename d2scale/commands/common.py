"""What the commands share."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from typing import TYPE_CHECKING

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import write_atomically

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_command(
    commands: Commands,
    name: str,
    text: str,
    epilog: str = "",
    takes_opts: bool = False,
) -> argparse.ArgumentParser:
    """Add the parser of one command.

    Args:
        commands: of the whole command line.
        name: what the user types.
        text: one line for the list of commands, without a full stop.
        epilog: an example.
        takes_opts: whether KEY VALUE pairs may follow; they are in ``arguments.opts``.
    """
    description = text[0].upper() + text[1:] + "."
    if takes_opts:
        description += " KEY VALUE pairs at the end override config keys."
    parser = commands.add_parser(
        name,
        help=text,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(takes_opts=takes_opts)
    return parser


def emit(text: str, path: str | None) -> None:
    """Print ``text``, or write it to the file ``path``.

    Raises:
        ConfigError: if the file cannot be written.
    """
    if path is None:
        sys.stdout.write(text)
        return
    write_atomically(path, text, partial(_output_error, path))


def _output_error(path: str, reason: str) -> ConfigError:
    return ConfigError([Fault("--output", path, "a file that can be written", reason)])
