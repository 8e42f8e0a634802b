"""How runs look in pictures: each has a colour, and a line style for those who see no colours."""

from __future__ import annotations

from dataclasses import dataclass

DASHES: tuple[str | tuple[int, tuple[int, ...]], ...] = (
    "-",
    (0, (6, 2)),
    (0, (1, 1)),
    (0, (6, 2, 1, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)


@dataclass(frozen=True)
class Theme:
    """Colours of a picture.

    Attributes:
        paper, ink, grid: background, text, lines of the grid.
        lines: of the runs, in order; distinct for colour-blind people too.
    """

    paper: str
    ink: str
    grid: str
    lines: tuple[str, ...]


# After M. Okabe and K. Ito, "Color universal design" (2008), darkened and lightened in pairs so
# that a line stands out from its paper.
LIGHT = Theme(
    "#ffffff",
    "#1f2328",
    "#d8dee4",
    ("#0072b2", "#d55e00", "#007a5a", "#b0508a", "#7a6400", "#56606b"),
)
DARK = Theme(
    "#161b22",
    "#e6edf3",
    "#30363d",
    ("#56b4e9", "#ff9350", "#2fd3a2", "#f0a3d0", "#f0e442", "#b6bec8"),
)


def line_of(theme: Theme, number: int) -> tuple[str, str | tuple[int, tuple[int, ...]]]:
    """Return colour and line style of a run by its number: no two of the first thirty agree."""
    colours = len(theme.lines)
    return theme.lines[number % colours], DASHES[(number + number // colours) % len(DASHES)]
