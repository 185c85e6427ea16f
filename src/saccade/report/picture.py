"""One picture of a bench: quality against speed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from saccade.bench.summary import Mean, pareto
from saccade.core.recipe import NONE

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
_MARKERS = "os^Dv*P"
Look = dict[str, Any]
_REFERENCES: dict[str, Look] = {
    "random": {"color": "#888888", "linestyle": "--", "marker": "x"},
    "uniform": {"color": "#888888", "linestyle": ":", "marker": "+"},
}


def draw_quality_speed(means: Sequence[Mean], path: Path, title: str) -> None:
    """Draw retention against prefill speed-up as PNG: one line for each method over its budgets, and the Pareto front."""
    # Figure, not pyplot: no global state and no display.
    figure = Figure(figsize=(9, 5.5), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_unmodified(axes)
    _draw_front(axes, pareto(means))
    lines: dict[str, list[Mean]] = {}
    for mean in means:
        if mean.method != NONE and mean.retention is not None:
            lines.setdefault(mean.method, []).append(mean)
    looks = iter(range(len(lines)))
    drawn = [(points, _REFERENCES.get(method) or _look(next(looks))) for method, points in lines.items()]
    for points, look in drawn:
        _draw_line(axes, points, look)
    _dress(axes, title)
    _write_budgets(axes, drawn)
    figure.savefig(path, format="png")


def _draw_unmodified(axes: Axes) -> None:
    axes.axhline(1, color="#cccccc", linewidth=1, zorder=1)
    axes.axvline(1, color="#cccccc", linewidth=1, zorder=1)
    axes.plot(1, 1, color="#333333", linestyle="none", marker="h", markersize=9, label="unmodified model", zorder=4)


def _draw_front(axes: Axes, front: Sequence[Mean]) -> None:
    """A broad pale line through the points that no other beats."""
    by_speed = sorted(front, key=lambda mean: mean.speedup)
    speed, quality = [mean.speedup for mean in by_speed], [mean.retention for mean in by_speed]
    axes.plot(speed, quality, color="#f2d98d", linewidth=5, solid_capstyle="round", label="Pareto front", zorder=2)


def _draw_line(axes: Axes, points: Sequence[Mean], look: Look) -> None:
    speed = [point.speedup for point in points]
    quality = [point.retention for point in points]
    axes.plot(speed, quality, label=fill(points[0].method, 30), linewidth=1.8, markersize=6.5, zorder=3, **look)


def _write_budgets(axes: Axes, drawn: Sequence[tuple[Sequence[Mean], Look]]) -> None:
    """Write the budget at each point, except where another number stands already."""
    taken: list[tuple[float, float]] = []
    for points, look in drawn:
        for point in points:
            x, y = axes.transData.transform((point.speedup, point.retention))
            if point.keep is None or any(abs(x - left) < 40 and abs(y - up) < 18 for left, up in taken):
                continue
            taken.append((x, y))
            at = (point.speedup, point.retention)
            axes.annotate(str(point.keep), at, (4, 4), textcoords="offset points", fontsize=6.5, color=look["color"])


def _look(number: int) -> Look:
    return {
        "color": _COLOURS[number % len(_COLOURS)],
        "marker": _MARKERS[number % len(_MARKERS)],
        # A second round through the colours is told apart by its dashes.
        "linestyle": "-" if number < len(_COLOURS) else "-.",
    }


def _dress(axes: Axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel("prefill speed-up over the unmodified model (language model only)")
    axes.set_ylabel("score retained, mean over tasks")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#f0f0f0")
    axes.set_axisbelow(True)
    axes.margins(0.08)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, title="small numbers: keep")
