"""How runs look in pictures: each has a colour, and a line style for those who see no colours."""

from __future__ import annotations

from typing import NamedTuple

Dashes = str | tuple[int, tuple[int, ...]]
DASHES: tuple[Dashes, ...] = (
    "-",
    *((0, lengths) for lengths in ((6, 2), (1, 1), (6, 2, 1, 2), (3, 1, 1, 1, 1, 1))),
)


class Theme(NamedTuple):
    """Colours of a picture."""

    paper: str
    ink: str
    grid: str
    lines: tuple[str, ...]  # of the runs, in order; distinct for colour-blind people too


# After M. Okabe and K. Ito, "Color universal design" (2008), darkened and lightened in pairs so
# that a line stands out from its paper.
_ON_LIGHT = ("#0072b2", "#d55e00", "#007a5a", "#b0508a", "#7a6400", "#56606b")
_ON_DARK = ("#56b4e9", "#ff9350", "#2fd3a2", "#f0a3d0", "#f0e442", "#b6bec8")
LIGHT = Theme(paper="#ffffff", ink="#1f2328", grid="#d8dee4", lines=_ON_LIGHT)
DARK = Theme(paper="#161b22", ink="#e6edf3", grid="#30363d", lines=_ON_DARK)


def line_of(theme: Theme, number: int) -> tuple[str, Dashes]:
    """Return colour and line style of a run by its number: no two of the first thirty agree."""
    colours = len(theme.lines)
    return theme.lines[number % colours], DASHES[(number + number // colours) % len(DASHES)]
