"""Values that nobody meant, and places to put them, for the fuzzers."""

from __future__ import annotations

import copy
import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

# A run of the tests takes the same few cases always; "make fuzz" draws others every round.
FUZZES = "D2SCALE_FUZZ" in os.environ


def cases(count: int):
    """Return hypothesis settings for ``count`` cases, none of which has a deadline."""
    return settings(
        max_examples=4 * count if FUZZES else count,
        derandomize=not FUZZES,
        database=None,
        report_multiple_bugs=False,
        phases=(Phase.explicit, Phase.generate),
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


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
