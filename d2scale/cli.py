"""The ``d2scale`` command line: runs a command and prints the mistakes that a user can mend."""

from __future__ import annotations

import argparse
import errno
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from d2scale import __version__
from d2scale.commands import all_commands
from d2scale.errors import (
    EXIT_STATUS_USER_ERROR,
    ConfigError,
    D2ScaleError,
    Fault,
    MissingPackageError,
    printable,
)
from d2scale.launch.topology import number_of_torchrun, under_torchrun
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
# How the system refuses a path that the user has named, wherever it is first used.
_REFUSED = (errno.ENAMETOOLONG, errno.EACCES, errno.EPERM)

_INTERRUPTED = "d2scale: interrupted"
# torchrun has noticed by then that a rank has ended.
_LATER_SECONDS = 3.0
_STATUS_INTERRUPTED = 130  # as a shell has it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status: 0, or 2 for a user's mistake."""
    arguments = _parse(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    _print_any_text()
    try:
        _refuse_empty(arguments, sys.argv[1:] if argv is None else argv)
        with _interrupts_ending_imports(), telling_of_shortages():
            return command(arguments)
    except D2ScaleError as error:
        _let_first_rank_tell()
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
        print(_INTERRUPTED, file=sys.stderr)
        return _STATUS_INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe has left; Python would complain again when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        return _tell_of_path(error)


def _tell_of_path(error: OSError) -> int:
    """Print why the system refuses a path, and return the status; raise any other error."""
    if error.errno not in _REFUSED or error.filename is None:
        raise error
    allowed = "a name of a file or folder that the system lets this user look at"
    fault = Fault("path", str(error.filename), allowed, f"check it ({error.strerror})")
    print(f"d2scale: error: {fault}", file=sys.stderr)
    return EXIT_STATUS_USER_ERROR


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong with words in characters that no terminal obeys."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def _let_first_rank_tell() -> None:
    """Wait on all ranks of torchrun but the first of this machine, so that it prints its error.

    Then torchrun ends the others, which mostly have the same to tell.
    """
    if under_torchrun() and number_of_torchrun("LOCAL_RANK", 0) > 0:
        time.sleep(_LATER_SECONDS)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _Parser(
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


@contextmanager
def _interrupts_ending_imports() -> Iterator[None]:
    """Within the context, Ctrl-C in the midst of an import ends the process at once.

    torch's and numpy's imports catch whatever is raised in parts of them: Ctrl-C would be lost, or
    leave half a package.
    """

    def end_or_raise(number: int, frame: FrameType | None) -> None:
        below = frame
        while below is not None:
            if below.f_code.co_filename == "<frozen importlib._bootstrap>":
                os.write(2, f"{_INTERRUPTED}\n".encode())
                os._exit(_STATUS_INTERRUPTED)
            below = below.f_back
        signal.default_int_handler(number, frame)

    # Whoever starts a program in the background may have it ignore Ctrl-C.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler or not _is_main_thread():
        yield
        return
    signal.signal(signal.SIGINT, end_or_raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _print_any_text() -> None:
    """Let names of files be printed whose characters are broken, or unknown to the terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _refuse_empty(arguments: argparse.Namespace, words: Sequence[str]) -> None:
    """Raise a ConfigError for empty arguments, as unset variables of the shell leave them."""
    # Among the words of a list there may be KEY VALUE pairs, where a value may be empty.
    listed = [] if arguments.takes_opts else ["runs"]
    empty = [
        name
        for name, value in vars(arguments).items()
        if value == "" or (name in listed and "" in value)
    ]
    given = {word.partition("=")[0] for word in words}
    keys = [option if (option := _option(name)) in given else name for name in empty]
    if keys:
        advice = "leave it out, or give it a value"
        raise ConfigError([Fault(key, "", "no empty word", advice) for key in keys])


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


if __name__ == "__main__":
    sys.exit(main())
