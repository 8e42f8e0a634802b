"""The errors that a user can mend: one line for each fault, all faults at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXIT_STATUS_USER_ERROR = 2
_LONGEST_VALUE = 500  # characters of a value in a message


class D2ScaleError(Exception):
    """A mistake that the user can mend. The command line prints it and exits with status 2."""


@dataclass(frozen=True)
class Fault:
    """One wrong setting."""

    key: str  # the config key, option or file that is wrong
    value: Any  # what it holds now
    allowed: str  # what it may hold
    advice: str  # what to do about it

    def __str__(self) -> str:
        # A line feed in a key would look like two faults, and a terminal obeys escape sequences.
        key = self.key if self.key.isprintable() else ascii(self.key)
        return f"{key} is {_shown(self.value)}; allowed: {self.allowed}; {self.advice}"


def _shown(value: Any) -> str:
    """Return a value as Python writes it, the middle left out where it is long."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # thousands of digits, thousands of brackets
        return f"({type(value).__name__}, too large to show)"
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]} ..."


class ConfigError(D2ScaleError):
    """Every fault that was found in a config, one line each."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        # Several checks may find the same fault.
        self.faults = tuple({str(fault): fault for fault in faults}.values())
        super().__init__("\n".join(str(fault) for fault in self.faults))

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
