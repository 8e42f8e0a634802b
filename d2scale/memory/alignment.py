"""Matching the entries of two sequences: the shortest edit script of Myers (1986).

difflib's matcher is no substitute: it looks for long runs, not for the most matches, and predicts
some models' memory up to half a per cent worse.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence


def corresponding(ones: Sequence[Hashable], twos: Sequence[Hashable]) -> dict[int, int]:
    """Map positions in ``twos`` to those of their partners in ``ones``.

    As many as possible are matched, the last ones first: where ``twos`` goes around a loop more
    often, the last rounds correspond.

    >>> corresponding("abc", "ababc")
    {4: 2, 3: 1, 2: 0}
    """
    backwards = _match(ones[::-1], twos[::-1])
    return {len(twos) - 1 - two: len(ones) - 1 - one for one, two in backwards}


def _match(ones: Sequence[Hashable], twos: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Greedy matches, along the furthest-reaching paths of "An O(ND) Difference Algorithm"."""
    reached = {1: 0}
    history = []
    for edits in range(len(ones) + len(twos) + 1):
        history.append(dict(reached))
        for diagonal in range(-edits, edits + 1, 2):
            x = _start(reached, edits, diagonal)
            while x < len(ones) and x - diagonal < len(twos) and ones[x] == twos[x - diagonal]:
                x += 1
            reached[diagonal] = x
            if x >= len(ones) and x - diagonal >= len(twos):
                return _path(history, x, x - diagonal)
    raise AssertionError("the edits of both sequences' whole lengths always suffice")


def _start(reached: dict[int, int], edits: int, diagonal: int) -> int:
    """How far in ``ones`` a path begins on ``diagonal`` after its latest edit."""
    down = reached.get(diagonal + 1, -1)  # skips an entry of twos
    right = reached.get(diagonal - 1, -1) + 1  # skips an entry of ones
    if diagonal == -edits or (diagonal != edits and right <= down):
        return down
    return right


def _path(history: list[dict[int, int]], x: int, y: int) -> list[tuple[int, int]]:
    matches = []
    for edits in reversed(range(len(history))):
        diagonal = x - y
        start = _start(history[edits], edits, diagonal)
        while x > start:
            x, y = x - 1, y - 1
            matches.append((x, y))
        if edits == 0:
            break
        went_down = start == history[edits].get(diagonal + 1, -1) and (
            diagonal == -edits
            or (diagonal != edits and history[edits].get(diagonal - 1, -1) + 1 <= start)
        )
        x, y = (start, start - diagonal - 1) if went_down else (start - 1, start - diagonal)
    return matches[::-1]
