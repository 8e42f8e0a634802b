"""The ``d2scale`` command line: runs a command and prints the mistakes that a user can mend."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence

from d2scale import __version__
from d2scale.commands import all_commands
from d2scale.errors import (
    EXIT_STATUS_USER_ERROR,
    ConfigError,
    D2ScaleError,
    Fault,
    MissingPackageError,
)
from d2scale.run_folder.shortages import telling_of_shortages

# What the extra "train" brings: planning works without.
TRAINING_PACKAGES = (
    "torch",
    "torchvision",
    "tensorboard",
    "tqdm",
    "PIL",
    "numpy",
    "matplotlib",
    "jinja2",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a user's mistake."""
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # names of files may hold what has no character
            stream.reconfigure(errors="backslashreplace")
    try:
        _refuse_empty(arguments)
        with telling_of_shortages():
            return command(arguments)
    except D2ScaleError as error:
        for line in str(error).splitlines():
            print(f"d2scale: error: {line}", file=sys.stderr)
        return EXIT_STATUS_USER_ERROR
    except ModuleNotFoundError as error:
        if error.name not in TRAINING_PACKAGES:
            raise
        missing = MissingPackageError(error.name, "this command", "pip install 'd2scale[train]'")
        print(f"d2scale: error: {missing}", file=sys.stderr)
        return EXIT_STATUS_USER_ERROR
    except KeyboardInterrupt:
        print("d2scale: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of a pipe has left; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="d2scale", description="Run recipes written for a cluster on the GPUs at hand."
    )
    parser.add_argument("--version", action="version", version=f"d2scale {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in all_commands():
        command.add_parser(commands)
    # argparse cannot take KEY VALUE pairs behind options: they are what it leaves over.
    arguments, rest = parser.parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("--") or not arguments.takes_opts]
    if wrong and not arguments.passes_on(arguments):
        parser.error(f"unrecognized arguments: {' '.join(wrong)}")
    arguments.opts = rest
    return arguments


def _refuse_empty(arguments: argparse.Namespace) -> None:
    """Raise a ConfigError for words that a variable of the shell has left empty."""
    values = {name: value for name, value in vars(arguments).items() if name != "opts"}
    empty = [
        name
        for name, value in values.items()
        if value == "" or (isinstance(value, list) and "" in value)
    ]
    if empty:
        advice = "leave it out, or give it a value"
        raise ConfigError(
            [Fault(f"argument {name}", "", "no empty word", advice) for name in empty]
        )


if __name__ == "__main__":
    sys.exit(main())
