"""One picture of a bench: quality against speed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from foveate.bench.cells import keep_text
from foveate.bench.summary import Mean, pareto
from foveate.core.recipe import NONE
from foveate.report.picture_looks import PictureLook, picture_look

_LETTER = 9
"""Pixels that a letter of the small print is wide, at most."""
_REFERENCES: dict[str, PictureLook] = {
    "random": {"color": "#888888", "linestyle": "--", "marker": "x"},
    "uniform": {"color": "#888888", "linestyle": ":", "marker": "+"},
}


def draw_quality_speed(means: Sequence[Mean], path: Path, title: str) -> None:
    """Draw retention against prefill speed-up as PNG: each method over its budgets or settings, and the Pareto front."""
    lines: dict[str, list[Mean]] = {}
    for mean in means:
        if mean.method != NONE and mean.retention is not None:
            lines.setdefault(_line(mean), []).append(mean)
    # Figure, not pyplot: no global state and no display. The legend must find room beside the axes.
    figure = Figure(figsize=(9, max(5.5, 1 + 0.26 * len(lines))), dpi=150, layout="constrained")
    axes = figure.subplots()
    _draw_unmodified(axes)
    _draw_front(axes, pareto(means))
    numbers = itertools.count()
    drawn = [(points, _REFERENCES.get(line) or picture_look(next(numbers))) for line, points in lines.items()]
    for line, (points, look) in zip(lines, drawn):
        _draw_line(axes, line, points, look)
    _dress(axes, title)
    # Only now is known where on the picture the points are.
    figure.draw_without_rendering()
    _write_budgets(axes, drawn)
    figure.savefig(path, format="png")


def _line(mean: Mean) -> str:
    """What a point belongs to: its recipe, or, where that alone says how much is saved, its method."""
    whole = keep_text(mean.keep) or " + " in mean.method
    return mean.method if whole else mean.method.partition("(")[0]


def _mark(mean: Mean) -> str:
    """What tells a point from the others of its line."""
    return keep_text(mean.keep) or mean.method.removeprefix(_line(mean)).removeprefix("(").removesuffix(")")


def _place(mean: Mean) -> tuple[float, float]:
    """Where on the picture a point is; one whose retention is unknown does not come here."""
    assert mean.retention is not None
    return mean.speedup, mean.retention


def _places(points: Sequence[Mean]) -> tuple[list[float], list[float]]:
    places = [_place(point) for point in points]
    return [speed for speed, _ in places], [quality for _, quality in places]


def _draw_unmodified(axes: Axes) -> None:
    axes.axhline(1, color="#cccccc", linewidth=1, zorder=1)
    axes.axvline(1, color="#cccccc", linewidth=1, zorder=1)
    axes.plot(1, 1, color="#333333", linestyle="none", marker="h", markersize=9, label="unmodified model", zorder=4)


def _draw_front(axes: Axes, front: Sequence[Mean]) -> None:
    """A broad pale line through the points that no other beats."""
    by_speed = sorted(front, key=lambda mean: mean.speedup)
    axes.plot(*_places(by_speed), color="#f2d98d", linewidth=5, solid_capstyle="round", label="Pareto front", zorder=2)


def _draw_line(axes: Axes, line: str, points: Sequence[Mean], look: PictureLook) -> None:
    axes.plot(*_places(points), label=fill(line, 34), linewidth=1.8, markersize=6.5, zorder=3, **look)


def _write_budgets(axes: Axes, drawn: Sequence[tuple[Sequence[Mean], PictureLook]]) -> None:
    """Write the budget (or the settings) at each point, except where another text stands already."""
    taken: list[tuple[float, float, float]] = []
    for points, look in drawn:
        for point in points:
            text = _mark(point)
            x, y = axes.transData.transform(_place(point))
            end = x + _LETTER * len(text)
            if not text or any(x < right and left < end and abs(y - up) < 2 * _LETTER for left, right, up in taken):
                continue
            taken.append((x, end, y))
            axes.annotate(text, _place(point), (4, 4), textcoords="offset points", fontsize=6.5, color=look["color"])


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
    axes.legend(
        loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9, title="small print: keep, or settings"
    )
