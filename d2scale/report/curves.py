"""The curves of the runs, against images seen, iterations and time."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from d2scale.report.document import Picture
from d2scale.report.history import AXES, Axis
from d2scale.report.runs import Run
from d2scale.report.styles import DARK, LIGHT, Theme, line_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TITLES = {
    "total_loss": "total loss",
    "lr": "learning rate",
    "noise_scale": "noise scale in images",
    "gain": "the recipe's steps that a step is worth",
    "time": "seconds a step",
    "data_time": "seconds a step waits for data",
}
_LOGARITHMIC = {"noise_scale"}  # over powers of ten, all of them of interest
# The part of the axis over which a smoothed point is the mean.
_WINDOW = 1 / 20
_FEWEST_IN_WINDOW = 5
_FEWEST_TO_SMOOTH = 10
_SIZE = (6.4, 3.6)  # inches
_DOTS_PER_INCH = 150
_COLOURS_IN_FILE = 128


def draw_curves(runs: Sequence[Run]) -> tuple[Picture, ...]:
    """Draw every curve against every axis; empty if the runs have none."""
    return tuple(
        Picture(
            name=f"{re.sub(r'[^A-Za-z0-9_-]', '_', name)}-{axis}.png",
            title=f"{title_of(name)}, against {title}",
            light=_draw(runs, [name], axis, LIGHT),
            dark=_draw(runs, [name], axis, DARK),
            axis=axis,
        )
        for name in curve_names(runs)
        for axis, title in AXES.items()
        if _any_points(runs, name, axis)
    )


def _any_points(runs: Sequence[Run], name: str, axis: Axis) -> bool:
    return any(len(_points(run, name, axis)[0]) for run in runs)


def _points(run: Run, name: str, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Return places on the axis, and values that can be drawn: shape (points,)."""
    places, values = run.history.curve(name, axis)
    drawn = values > 0 if name in _LOGARITHMIC else np.isfinite(values)
    return places[drawn], values[drawn]


def draw_overview(runs: Sequence[Run]) -> Picture | None:
    """Draw all curves against images seen in one picture; None if there are none."""
    names = [name for name in curve_names(runs) if _any_points(runs, name, "images")]
    if not names:
        return None
    light, dark = (_draw(runs, names, "images", theme) for theme in (LIGHT, DARK))
    return Picture("curves.png", "all curves, against images seen", light, dark, axis="images")


def curve_names(runs: Sequence[Run]) -> tuple[str, ...]:
    """Return the names of the curves: losses, learning rate, noise of the gradient, times."""
    names = {name for run in runs for name in run.history.names()}
    losses = sorted(name for name in names if name.startswith("loss"))
    wanted = ("total_loss", *losses, "lr", "noise_scale", "gain", "time", "data_time")
    return tuple(name for name in wanted if name in names)


def title_of(name: str) -> str:
    """Return what a curve shows, with its name in metrics.json."""
    return f"{_TITLES[name]} ({name})" if name in _TITLES else name


def smooth(places: np.ndarray, values: np.ndarray, width: float) -> np.ndarray:
    """Return the mean of the values within ``width`` around each place; shape (points,).

    The places ascend. Where they are images, runs of different batch sizes are smoothed alike.
    """
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.searchsorted(places, places - width / 2, "left")
    last = np.searchsorted(places, places + width / 2, "right")
    means: np.ndarray = (sums[last] - sums[first]) / (last - first)
    return means


def _draw(runs: Sequence[Run], names: Sequence[str], axis: Axis, theme: Theme) -> bytes:
    """Draw one subplot for each name, in two columns if there are several."""
    # Without pyplot there is no global state, and no window system is asked for.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(len(names), 2)
    rows = -(-len(names) // columns)
    size = (columns * _SIZE[0], rows * _SIZE[1])
    figure = Figure(figsize=size, dpi=_DOTS_PER_INCH, facecolor=theme.paper)
    FigureCanvasAgg(figure)
    # Laying out by the size of the labels would draw everything twice.
    margins = {"left": 0.12 / columns, "right": 1 - 0.03 / columns}
    margins |= {"bottom": 0.17 / rows, "top": 1 - 0.1 / rows}
    figure.subplots_adjust(**margins, wspace=0.18, hspace=0.38)
    for number, name in enumerate(names, start=1):
        axes = figure.add_subplot(rows, columns, number)
        _plot(axes, runs, name, axis, theme)
        if number == 1 and axes.lines:
            legend = axes.legend(fontsize=11, handlelength=3, labelcolor=theme.ink)
            legend.get_frame().set(facecolor=theme.paper, edgecolor=theme.grid)
            legend.set_zorder(5)
    return _to_png(figure)


def _plot(axes: Axes, runs: Sequence[Run], name: str, axis: Axis, theme: Theme) -> None:
    curves = [(number, *_points(run, name, axis)) for number, run in enumerate(runs)]
    curves = [curve for curve in curves if len(curve[1])]
    end = max((places[-1] for _, places, _ in curves), default=0.0)
    scale, unit = _unit(axis, end)
    # One width for all runs, wide enough for the sparsest.
    gaps = [float(np.median(np.diff(places))) for _, places, _ in curves if len(places) > 1]
    width = max([end * _WINDOW, *(_FEWEST_IN_WINDOW * gap for gap in gaps)])
    smoothed = []
    for number, places, values in curves:
        colour, dashes = line_of(theme, number)
        main = values
        # The learning rate is known exactly: smoothing would only blur it.
        if name != "lr" and len(values) >= _FEWEST_TO_SMOOTH:
            axes.plot(places / scale, values, color=colour, linewidth=0.7, alpha=0.4)
            main = _smooth(name, places, values, width)
        marker = "o" if len(values) == 1 else None
        label, places = _label(runs[number].name, number), places / scale
        axes.plot(places, main, label=label, marker=marker, color=colour, ls=dashes, lw=2.0)
        smoothed.append(main)
    _style(axes, name, unit, theme)
    if curves:
        _limit(axes, name, np.concatenate([values for _, _, values in curves]), smoothed)


def _smooth(name: str, places: np.ndarray, values: np.ndarray, width: float) -> np.ndarray:
    if name in _LOGARITHMIC:
        return np.exp(smooth(places, np.log(values), width))
    return smooth(places, values, width)


def _unit(axis: Axis, end: float) -> tuple[float, str]:
    """Return the size of an axis's unit and its title, for places up to ``end``."""
    if axis != "time":
        return 1.0, AXES[axis]
    for seconds, unit in ((3600.0, "hours"), (60.0, "minutes")):
        if end >= 2 * seconds:
            return seconds, f"{unit} of training"
    return 1.0, "seconds of training"


def _limit(axes: Axes, name: str, values: np.ndarray, smoothed: list[np.ndarray]) -> None:
    """Let a few outliers, such as the first step's time, leave the picture."""
    if name in _LOGARITHMIC:
        values, smoothed = np.log(values), [np.log(line) for line in smoothed]
    low, high = np.quantile(values, (0.005, 0.995))
    low = min([low, *(line.min() for line in smoothed)])
    # The noise is an average already, and may grow to the very end.
    share = 1.0 if name in ("noise_scale", "gain") else 0.98
    high = max([high, *(np.quantile(line, share) for line in smoothed)])
    if high > low:
        limits = np.array([low - 0.05 * (high - low), high + 0.05 * (high - low)])
        axes.set_ylim(*(np.exp(limits) if name in _LOGARITHMIC else limits))


def _style(axes: Axes, name: str, unit: str, theme: Theme) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    axes.set_facecolor(theme.paper)
    # With a place of its own the title is not laid out around the ticks, which takes time.
    axes.set_title(_plain(title_of(name)), color=theme.ink, fontsize=13, loc="left", y=1.0)
    axes.set_xlabel(unit, color=theme.ink, fontsize=12)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    if name in _LOGARITHMIC:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.tick_params(colors=theme.ink, labelsize=11)
    axes.grid(color=theme.grid, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)


def _label(name: str, number: int) -> str:
    """Return a run's name, or "run 1" for the first if the font lacks a character of it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    font = get_font(findfont(FontProperties()))
    return _plain(name if all(map(font.get_char_index, map(ord, name))) else f"run {number + 1}")


def _plain(text: str) -> str:
    """Escape what matplotlib reads as a formula, or as a label to hide, in a run's name."""
    escaped = text.replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def _to_png(figure: Figure) -> bytes:
    """Return the picture with few colours: a third of the size, with no visible difference."""
    from PIL import Image

    content, small = io.BytesIO(), io.BytesIO()
    with warnings.catch_warnings():
        # The name of a loss may hold characters that the font lacks; they become boxes.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(content, format="png", facecolor=figure.get_facecolor())
    with Image.open(content) as picture:
        picture.convert("RGB").quantize(_COLOURS_IN_FILE).save(small, format="png")
    return small.getvalue()
