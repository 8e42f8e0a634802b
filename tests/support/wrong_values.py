"""Values that nobody meant, and places to put them, for the fuzzers."""

from __future__ import annotations

import copy
import functools
import os
import signal
from contextlib import contextmanager

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

from d2scale.errors import D2ScaleError

# A run of the tests takes the same few cases always; "make fuzz" draws others every round.
FUZZES = "D2SCALE_FUZZ" in os.environ
# A case takes less than a second of it, whatever else the machine does.
_MOST_CPU_SECONDS = 30
tried = 0  # cases so far


def cases(count: int):
    """Return a decorator of a hypothesis test: ``count`` cases, each of which fails if it hangs."""
    options = settings(
        max_examples=4 * count if FUZZES else count,
        derandomize=not FUZZES,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )

    def decorate(test):
        case = test.hypothesis.inner_test

        @functools.wraps(case)
        def bounded(*arguments, **keywords):
            global tried
            tried += 1
            with _hanging_fails():
                return case(*arguments, **keywords)

        test.hypothesis.inner_test = bounded
        return options(test)

    return decorate


@contextmanager
def _hanging_fails():
    """Within the context, fail after so much time of the processor; again where that is caught."""

    def fail(*_):
        pytest.fail(f"{_MOST_CPU_SECONDS} seconds of the processor and no end")

    before = signal.signal(signal.SIGPROF, fail)
    signal.setitimer(signal.ITIMER_PROF, _MOST_CPU_SECONDS, 1)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


@contextmanager
def may_be_refused():
    """Within the context a D2ScaleError may be raised, of printable lines and no great length."""
    message = ""
    try:
        yield
    except D2ScaleError as error:
        message = str(error)
    assert all(line.isprintable() for line in message.split("\n"))
    assert len(message) < 20_000


NUMBERS = st.one_of(
    st.integers(-3, 3000),
    st.integers(-(10**40), 10**40),
    st.sampled_from([2**31, 2**63, 10**400]),
    st.floats(),
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    NUMBERS,
    st.text(max_size=20),
    st.sampled_from(["auto", "cpu", "None", "(", "1e400", "\x1b[31m", "a\nb", "x" * 3000]),
    st.sampled_from(["", "\0", "\ud800", "\udcff", "../..", "/", ".", "~", "://", "<b>|`", " "]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=6,
)


def places_in(content, above=()):
    """Yield the keys that lead to each value of nested dicts and lists."""
    pairs = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in pairs:
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from places_in(value, (*above, key))


def changed(content, place, value):
    """Return a copy of nested dicts and lists with another value at ``place``."""
    content = copy.deepcopy(content)
    node = content
    for key in place[:-1]:
        node = node[key]
    node[place[-1]] = value
    return content


def wrong_in(content):
    """Draw copies of nested dicts and lists in which one to three values are others."""
    places = list(places_in(content))
    # From the last to the first: no change takes away the place of a later one.
    changes = st.dictionaries(st.sampled_from(places), VALUES, min_size=1, max_size=3)
    return changes.map(lambda pairs: _apply(content, pairs))


def _apply(content, pairs):
    for place in sorted(pairs, key=lambda keys: [str(key) for key in keys], reverse=True):
        content = changed(content, place, pairs[place])
    return content


def wrong_bytes(content: bytes):
    """Draw copies of a file's content that are cut short, changed or mixed in a few places."""
    place = st.integers(0, max(len(content) - 1, 0))
    byte = st.integers(0, 255)
    piece = st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\0" * 4])
    change = st.one_of(
        st.builds(lambda at: lambda data: data[:at], place),
        st.builds(lambda at, new: lambda data: _put(data, at, bytes([new])), place, byte),
        st.builds(lambda at, new: lambda data: _put(data, at, new), place, piece),
        st.builds(lambda at, new: lambda data: data[:at] + new + data[at:], place, piece),
        st.builds(lambda a, b: lambda data: data[:a] + data[b:], place, place),
    )
    return st.lists(change, min_size=1, max_size=3).map(
        lambda changes: functools.reduce(lambda data, change: change(data), changes, content)
    )


def _put(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]
