"""Rules that judge the values of config keys: one kind for planning, every engine and project."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from d2scale.config.keys import get_key
from d2scale.errors import Fault

_ABSENT = object()
_LARGEST = 2**31 - 1
# What is larger is a slip: no machine has it, and one that tries hangs.
MOST_IMAGES = 2**20  # in a step, and GPUs
LONGEST_EDGE = 2**15  # pixels
# What a test raises when the value has another type than the test was written for: a fault too.
_WRONG_TYPE = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)


@dataclass(frozen=True)
class Rule:
    """What one config key may hold."""

    key: str  # its dotted name, or an option of the command line
    allowed: str  # the values that it may hold, in words
    holds: Callable[[Any], bool]  # tests a value; raising an error of a wrong type means no
    advice: str = "correct it"  # what to do about another value

    def faults(self, value: Any) -> list[Fault]:
        """Return the fault of ``value`` in a list, which is empty if it is allowed."""
        try:
            if self.holds(value):
                return []
        except _WRONG_TYPE:
            pass
        return [self.fault(value)]

    def fault(self, value: Any) -> Fault:
        """Return the fault of a value that is not allowed."""
        return Fault(self.key, value, self.allowed, self.advice)


def judge(cfg: Any, rules: Iterable[Rule]) -> list[Fault]:
    """Return the faults of all keys that ``cfg`` has; keys that its engine lacks are skipped."""
    values = ((rule, get_key(cfg, rule.key, _ABSENT)) for rule in rules)
    return [fault for rule, value in values if value is not _ABSENT for fault in rule.faults(value)]


def one_of(key: str, choices: Sequence[Any], advice: str = "choose one") -> Rule:
    """Allow a few values, of the same type: 1 is not True."""
    allowed = ", ".join(str(choice) or "''" for choice in choices)
    typed = [(type(choice), choice) for choice in choices]
    return Rule(key, allowed, lambda value: (type(value), value) in typed, advice)


def whole(key: str, least: int, most: float = math.inf, advice: str = "correct it") -> Rule:
    """Allow whole numbers from ``least`` to ``most``."""
    allowed = f"a whole number from {least}" + ("" if most == math.inf else f" to {most}")
    return Rule(key, allowed, lambda value: is_whole(value) and least <= value <= most, advice)


def number(
    key: str,
    *,
    least: float = -math.inf,
    above: float = -math.inf,
    most: float = math.inf,
    below: float = math.inf,
    advice: str = "correct it",
) -> Rule:
    """Allow finite numbers within bounds, of which ``above`` and ``below`` are excluded."""
    bounds = (("from", least), ("above", above), ("at most", most), ("below", below))
    words = [f"{word} {bound}" for word, bound in bounds if math.isfinite(bound)]

    def holds(value: Any) -> bool:
        return is_number(value) and least <= value <= most and above < value < below

    return Rule(key, f"a number {', '.join(words)}", holds, advice)


def names(key: str, allowed: str) -> Rule:
    """Allow a list of strings."""

    def holds(value: Any) -> bool:
        return not isinstance(value, str) and all(isinstance(name, str) for name in value)

    return Rule(key, allowed, holds)


def or_none(rule: Rule) -> Rule:
    """Allow None too."""
    allowed = f"{rule.allowed}, or None"
    return replace(rule, allowed=allowed, holds=lambda value: value is None or rule.holds(value))


_QUOTES = ", in quotes: without them YAML reads on and off as True and False"


def type_of_default(key: str, default: Any) -> Rule:
    """Allow values of the type of the key's default, and anything if that is None."""
    kind = type(default).__name__
    if isinstance(default, list | tuple):
        kind = f"a list of {type(default[0]).__name__}" if default else "a list"
    return Rule(
        key,
        f"{kind}, such as {default!r}",
        lambda value: default is None or _has_type_of(value, default),
        "correct the value" + _QUOTES * isinstance(default, str),
    )


def of_any_size(key: str) -> Rule:
    """Allow whole numbers, in lists too, that can be counted up to, and all other values."""
    return Rule(key, f"whole numbers from -{_LARGEST} to {_LARGEST}", _is_countable)


def _is_countable(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_countable, value))
    return not is_whole(value) or -_LARGEST <= value <= _LARGEST


def is_whole(value: Any) -> bool:
    """Return whether ``value`` is a whole number; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether ``value`` is a finite number."""
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _has_type_of(value: Any, default: Any) -> bool:
    if isinstance(default, list | tuple):
        if not isinstance(value, list | tuple):
            return False
        # Entries have the type of the default's first one, if there is one.
        return not default or all(_has_type_of(entry, default[0]) for entry in value)
    if isinstance(default, float):
        return is_whole(value) or isinstance(value, float)
    return type(value) is type(default)
