"""Curves: what every picture has in common. Drawn without a screen, as PNG."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind readers tell apart too; on a dark page the bright ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
BRIGHT = ("#56B4E9", "#E69F00", "#009E73", "#CC79A7", "#F0E442", "#D55E00", "#e6e6e6")
THEMES = {
    "light": ("#000000", "0.35", "0.92", COLOURS),
    "dark": ("#e6e6e6", "0.65", "0.28", BRIGHT),
}  # text, axes, grid


def tidy(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.92")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def series(logs: Sequence[Sequence[Mapping[str, Any]]], key: str) -> tuple[list[int], np.ndarray]:
    """Log lines of each seed -> the steps at which all of them have `key`, and its values [seeds, steps]."""
    by_seed = [{line["step"]: line[key] for line in lines if key in line} for lines in logs]
    steps = sorted(set.intersection(*(set(seed) for seed in by_seed)))
    return steps, np.array([[seed[step] for step in steps] for seed in by_seed])


def panel(
    title: str, lines: Mapping[str, tuple[Sequence[int], Sequence[float]]], x: str, legend: bool = True
) -> Callable[[Axes], None]:
    """{label: (steps, values)} -> a function that draws them. Few points are marked, since a line of one cannot be seen."""

    def plot(axes: Axes) -> None:
        for label, (steps, values) in lines.items():
            few = "o" if len(steps) < 15 else ""
            axes.plot(steps, values, marker=few, markersize=3, linewidth=1.4, label=label.replace("$", r"\$"))
        tidy(axes, title.replace("$", r"\$"))
        axes.set_xlabel(x)
        low, high = (end(v for _, values in lines.values() for v in values) for end in (min, max))
        if not np.isfinite([low, high]).all():  # a loss that left the numbers: matplotlib draws what can be drawn
            low, high = 0.0, 1.0
        if high - low < 1e-6 * abs(low) or high == low:  # what does not change is a line in the middle
            axes.set_ylim(low - (abs(low) or 1.0), low + (abs(low) or 1.0))
        if legend and len(lines) > 2:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        elif legend and len(lines) > 1:
            axes.legend(frameon=False, fontsize=8)

    return plot


def draw(
    rows: int, columns: int, panels: Sequence[Callable[[Axes], None]], height: float = 2.7, width: float = 3.6
) -> dict[str, bytes]:
    """Panels in reading order, each drawn by its function -> {theme: PNG}; transparent, for a light and a dark page."""
    pictures = {}
    for theme, (text, line, grid, colours) in THEMES.items():
        settings: Any = {
            "text.color": text, "axes.edgecolor": line, "axes.labelcolor": line, "xtick.color": line,
            "ytick.color": line, "grid.color": grid, "axes.facecolor": "none", "axes.titlecolor": text,
            "axes.prop_cycle": f"cycler(color={list(colours)})", "axes.axisbelow": True, "font.size": 9,
        }  # fmt: skip
        with matplotlib.rc_context(settings):
            figure = Figure(figsize=(width * columns, height * rows), layout="constrained", facecolor="none")
            grid_of_axes = figure.subplots(rows, columns, squeeze=False).flat
            for axes in grid_of_axes[len(panels) :]:
                axes.set_axis_off()
            for panel, axes in zip(panels, grid_of_axes, strict=False):
                panel(axes)
                axes.grid(axis="y", color=grid)
            file = io.BytesIO()
            figure.savefig(file, dpi=150, facecolor="white" if theme == "light" else "none")
        pictures[theme] = file.getvalue()
    return pictures
