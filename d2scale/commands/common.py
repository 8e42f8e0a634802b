"""What the commands share: parsers, the set-up for training, and writing to ``-o FILE``."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from typing import Any, TypeAlias

from d2scale.errors import ConfigError, Fault
from d2scale.run_folder.files import write_atomically

# A string: argparse's class takes no parameter at run time.
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands,
    name: str,
    text: str,
    run: Callable[[argparse.Namespace], int],
    *,
    epilog: str = "",
    takes_opts: bool = False,
) -> argparse.ArgumentParser:
    """Add the parser of one command, and return it.

    ``text`` has no full stop; ``run`` returns the exit status. With ``takes_opts``, KEY VALUE pairs
    may follow, in ``arguments.opts``; so may options that the parser does not know, where
    ``arguments.passes_on(arguments)`` is true.
    """
    description = text[0].upper() + text[1:] + "."
    if takes_opts:
        description += " KEY VALUE pairs at the end override config keys."
    raw = argparse.RawDescriptionHelpFormatter
    parser = commands.add_parser(
        name, help=text, description=description, epilog=epilog, formatter_class=raw
    )
    parser.set_defaults(command=run, takes_opts=takes_opts, passes_on=lambda _: False)
    return parser


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument ``config``."""
    help_text = (
        "the recipe: a file or d2scale://NAME.yaml; a .py is run, as detectron2's LazyConfig"
    )
    parser.add_argument("config", help=help_text)


def let_idle_threads_sleep(cfg: Any) -> None:
    """Set up OpenMP for training on a CPU; it reads this when torch is imported."""
    if cfg.MODEL.DEVICE == "cpu":
        # They would spin: a step on two busy cores took 0.6 s instead of 4 s.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def emit(text: str, path: str | None = None) -> None:
    """Print ``text``, or write it to the file ``path``; ConfigError if that cannot be written."""
    if path is None:
        sys.stdout.write(text)
    else:
        write_output(text, path)


def write_output(content: str | bytes, path: str) -> None:
    """Write what ``-o`` asks for; ConfigError if the file cannot be written."""

    def error_of(reason: str) -> ConfigError:
        return ConfigError([Fault("--output", path, "a file that can be written", reason)])

    write_atomically(path, content, error_of)
