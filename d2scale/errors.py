"""The errors that a user can mend: one line for each fault, all faults at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXIT_STATUS_USER_ERROR = 2
_LONGEST_VALUE = 500  # characters of a value or key in a message
_LONGEST_ADVICE = 3000
_MOST_FAULTS = 100


def printable(text: str, keep: str = "") -> str:
    """Return a text whose characters a terminal shows and none of which it obeys.

    Line feeds, escape sequences and broken characters, but for those in ``keep``, are written as
    Python writes them in strings.
    """
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def one_line(error: BaseException) -> str:
    """Return the first line of what an exception says, or its type if it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


class D2ScaleError(Exception):
    """A mistake that the user can mend. The command line prints it and exits with status 2."""

    def __str__(self) -> str:
        return printable(super().__str__(), keep="\n")


@dataclass(frozen=True)
class Fault:
    """One wrong setting."""

    key: str  # the config key, option or file that is wrong
    value: Any  # what it holds now
    allowed: str  # what it may hold
    advice: str  # what to do about it

    def __str__(self) -> str:
        # A line feed in a name would look like two faults, and a terminal obeys escape sequences.
        key = _cut(self.key, _LONGEST_VALUE) or "''"
        allowed, advice = (_cut(text, _LONGEST_ADVICE) for text in (self.allowed, self.advice))
        return printable(f"{key} is {_shown(self.value)}; allowed: {allowed}; {advice}")


def _shown(value: Any) -> str:
    """Return a value as Python writes it, the end left out where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, thousands of brackets
        return f"({type(value).__name__}, too large to show)"
    return _cut(text, _LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]} ..."


class ConfigError(D2ScaleError):
    """Every fault that was found in a config, one line each."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        # Several checks may find the same fault.
        self.faults = tuple({str(fault): fault for fault in faults}.values())
        lines = [str(fault) for fault in self.faults[:_MOST_FAULTS]]
        more = len(self.faults) - len(lines)
        super().__init__("\n".join([*lines, *[f"and {more} more faults"] * (more > 0)]))

    def __reduce__(self) -> tuple[Any, ...]:
        # The launcher hands a worker's error to its parent by pickle.
        return (type(self), (self.faults,))


class DataError(ConfigError):
    """A dataset, annotation file or image that cannot be used."""


class CheckpointError(ConfigError):
    """A checkpoint that cannot be read, or does not belong to this model."""


@contextmanager
def collecting(faults: list[Fault]) -> Iterator[None]:
    """Within the context, add the faults of a ConfigError to ``faults`` instead of raising it."""
    try:
        yield
    except ConfigError as error:
        faults += error.faults


class MissingPackageError(D2ScaleError):
    """An optional package that the requested engine needs is not installed."""

    def __init__(self, package: str, needed_for: str, install: str) -> None:
        super().__init__(f"{needed_for} needs {package}, which is not installed; {install}")
        self._arguments = (package, needed_for, install)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(self), self._arguments)
