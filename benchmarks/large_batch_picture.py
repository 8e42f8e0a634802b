"""Draw the results of large_batch.py: AP of every rule at every batch, for each dataset.

    python benchmarks/large_batch_picture.py [--output docs/pictures]

Trains nothing. Points are means over the seeds, bars their standard errors.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from large_batch import DATASETS, RULES, kept_rows, mean_and_error
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from d2scale.report.styles import DARK, LIGHT, Theme, line_of

_SIZE = (10.0, 3.4)  # inches
_DOTS_PER_INCH = 120


def draw(theme: Theme) -> Figure:
    """Return a figure with a panel for each dataset that has results."""
    shown = {name: rows for name, dataset in DATASETS.items() if (rows := kept_rows(dataset))}
    figure = Figure(figsize=_SIZE, dpi=_DOTS_PER_INCH, facecolor=theme.paper, layout="constrained")
    panels = figure.subplots(1, len(shown), squeeze=False)[0]
    for axes, (name, rows) in zip(panels, shown.items(), strict=True):
        _draw_panel(axes, theme, name, rows)
    panels[0].set_ylabel("AP after training (%)", color=theme.ink)
    legend = panels[0].legend(loc="lower left", fontsize=8, facecolor=theme.paper)
    for text in legend.get_texts():
        text.set_color(theme.ink)
    return figure


def _draw_panel(axes: Axes, theme: Theme, name: str, rows: list[dict[str, Any]]) -> None:
    recipe, error = mean_and_error([row["AP"] for row in rows if row["rule"] == "recipe"])
    axes.axhline(recipe, color=theme.ink, linewidth=1, label="the recipe's batch")
    axes.axhspan(recipe - error, recipe + error, color=theme.grid, alpha=0.6, linewidth=0)
    for number, rule in enumerate(reversed(RULES)):
        ratios = sorted({row["ratio"] for row in rows if row["rule"] == rule})
        if not ratios:
            continue
        of_rule = [row for row in rows if row["rule"] == rule]
        cells = {1.0: (recipe, error)} | {
            ratio: mean_and_error([row["AP"] for row in of_rule if row["ratio"] == ratio])
            for ratio in ratios
        }
        colour, dashes = line_of(theme, number)
        points = [(ratio, *cell) for ratio, cell in sorted(cells.items())]
        axes.errorbar(
            [ratio for ratio, _, _ in points],
            [mean for _, mean, _ in points],
            # One seed has no error.
            yerr=[0.0 if math.isnan(half) else half for _, _, half in points],
            color=colour, linestyle=dashes, marker="o", markersize=4, capsize=3, label=rule,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xticks([0.5, 1, 2, 4, 8], ["½", "1", "2", "4", "8"])
    axes.set_ylim(bottom=0)
    axes.set_title(name, color=theme.ink, fontsize=10)
    axes.set_xlabel("batch over the recipe's", color=theme.ink)
    axes.set_facecolor(theme.paper)
    axes.grid(color=theme.grid, linewidth=0.6)
    axes.tick_params(colors=theme.ink)
    for spine in axes.spines.values():
        spine.set_color(theme.grid)


def main() -> None:
    """Write the picture, once for light and once for dark pages."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("docs/pictures"), metavar="DIR")
    folder = parser.parse_args().output
    for suffix, theme in (("", LIGHT), ("-dark", DARK)):
        path = folder / f"large-batch{suffix}.png"
        draw(theme).savefig(path, facecolor=theme.paper)
        print(path)


if __name__ == "__main__":
    main()
