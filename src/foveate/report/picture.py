"""The picture of a bench: quality against speed or memory, a panel for each place where methods act."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter, NullLocator

from foveate.bench.cells import keep_text
from foveate.bench.summary import Mean, pareto
from foveate.core.recipe import NONE
from foveate.report.across import SPEED, Across
from foveate.report.picture_looks import MOST_LOOKS, PictureLook, picture_look
from foveate.report.places import by_place
from foveate.report.training_mark import footnote, mark

_WIDTH = 8.0
"""Inches; at the 800 pixels of a README's column, nine points are letters of twelve pixels."""
_COLUMNS = 2
_SHARED_COLUMNS = 4
"""Of the legend above all panels."""
_PLOT, _LEGEND_ROW, _HEAD, _FOOT = 3.0, 0.18, 0.6, 0.45
"""Heights in inches: of a panel, of a row of its legend, of what stands above and below all panels."""
_SHORT_NAME = 21
"""Letters of a name, if two are to stand beside each other in a legend."""
_SIZES = (6.5, 3.0)
"""Of the marks at the largest and at the smallest budget."""
_LEGEND: dict[str, Any] = {
    "frameon": False,
    "fontsize": 9,
    "handlelength": 1.8,
    "columnspacing": 1.2,
    "labelspacing": 0.3,
    "handletextpad": 0.5,
}
_REFERENCES: dict[str, PictureLook] = {
    "random": {"color": "#808080", "linestyle": "--", "marker": "x"},
    "random_kv": {"color": "#808080", "linestyle": (0, (1, 2, 4, 2)), "marker": "x"},
    "uniform": {"color": "#808080", "linestyle": ":", "marker": "+"},
    "downsample": {"color": "#808080", "linestyle": "-.", "marker": "v"},
    "pool": {"color": "#808080", "linestyle": (0, (6, 2)), "marker": "s"},
}


@dataclass(frozen=True)
class _Line:
    """A method over its budgets or settings, ample ones first."""

    name: str
    points: tuple[Mean, ...]


@dataclass(frozen=True)
class _Panel:
    title: str
    lines: tuple[_Line, ...]

    @property
    def legend_columns(self) -> int:
        """As many names as fit beside each other."""
        return _COLUMNS if all(len(line.name) <= _SHORT_NAME for line in self.lines) else 1

    @property
    def legend_rows(self) -> int:
        """Height of the legend in lines of text."""
        return -(-sum(_written(line.name).count("\n") + 1 for line in self.lines) // self.legend_columns)


def draw_quality(means: Sequence[Mean], path: Path, title: str, across: Across = SPEED) -> None:
    """Draw retention against prefill speed-up, or what else is ``across``, as PNG.

    Each method over its budgets or settings, with intervals. Each place has its own panel; the baselines and the Pareto
    front of the whole are in all of them.
    """
    known = [mean for mean in across.of(means) if mean.retention is not None]
    references = [_Line(name, tuple(mean for mean in known if mean.method == name)) for name in _REFERENCES]
    panels = list(_panels(known)) or [_Panel("", ())]
    columns = min(_COLUMNS, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [_PLOT + _LEGEND_ROW * max(panel.legend_rows for panel in row) for row in rows]
    shared = 2 + sum(bool(line.points) for line in references)  # beside the unmodified model and the front
    head = _HEAD + _LEGEND_ROW * ((shared - 1) // _SHARED_COLUMNS)
    height = head + sum(heights) + _FOOT
    # Figure, not pyplot: no global state and no display.
    figure = Figure(figsize=(_WIDTH, height), dpi=200)
    # What stands above and below the panels is not known to the layout.
    between = (0, _FOOT / height, 1, 1 - (head + _FOOT) / height)
    figure.set_layout_engine("constrained", rect=between, hspace=0.05, wspace=0.04)
    axes = figure.subplots(len(rows), columns, squeeze=False, sharex=True, sharey=True, height_ratios=heights)
    front = sorted(pareto(known), key=lambda mean: mean.speedup)
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, panel in zip(axes.flat, panels):
        common = _draw_background(axis, front)
        common += [_draw_line(axis, line, _REFERENCES[line.name]) for line in references if line.points]
        own = [_draw_line(axis, line, picture_look(number)) for number, line in enumerate(panel.lines)]
        _dress(axis, panel, own, across)
    _dress_scale(axes[0, 0], known)
    for axis in axes[:, 0]:
        axis.set_ylabel("score retained", fontsize=9)
    _frame(figure, title, common, _caption(known, across))
    figure.savefig(path, format="png")


def _panels(means: Sequence[Mean]) -> Iterator[_Panel]:
    """One for each place, more where one would hold more lines than look different."""
    for place, rows in by_place(means, lambda mean: mean.method).items():
        lines: dict[str, list[Mean]] = {}
        for mean in rows:
            lines.setdefault(_line(mean), []).append(mean)
        drawn = [_Line(name, tuple(_ample_first(points))) for name, points in lines.items()]
        parts = [tuple(drawn[start : start + MOST_LOOKS]) for start in range(0, len(drawn), MOST_LOOKS)]
        for number, part in enumerate(parts, start=1):
            yield _Panel(f"{place} ({number} of {len(parts)})" if len(parts) > 1 else place, part)


def _line(mean: Mean) -> str:
    """What a point belongs to: its recipe, or, where that alone says how much is saved, its method."""
    whole = keep_text(mean.keep) or " + " in mean.method
    return mean.method if whole else mean.method.partition("(")[0]


def _ample_first(points: Sequence[Mean]) -> list[Mean]:
    """By budget; settings stay in the order in which they were given."""
    return sorted(points, key=lambda mean: -float(mean.keep or 0))


def _written(name: str) -> str:
    return fill(name, 2 * _SHORT_NAME)


def _place(mean: Mean) -> tuple[float, float]:
    """Where on the picture a point is; one whose retention is unknown does not come here."""
    assert mean.retention is not None
    return mean.speedup, mean.retention


def _draw_background(axis: Axes, front: Sequence[Mean]) -> list[Line2D]:
    """The unmodified model, and a broad pale line through the points that no other beats; as a legend shows them."""
    axis.axhline(1, color="#c8c8c8", linewidth=1, zorder=1)
    axis.axvline(1, color="#c8c8c8", linewidth=1, zorder=1)
    model = axis.plot(1, 1, color="#333333", linestyle="none", marker="h", markersize=8, label="unmodified model", zorder=4)
    places = [_place(mean) for mean in front] or [(1.0, 1.0)]
    label = "best of all panels (Pareto front)"
    return model + axis.plot(*zip(*places), color="#f2d98d", linewidth=6, solid_capstyle="round", label=label, zorder=2)


def _draw_line(axis: Axes, line: _Line, look: PictureLook) -> Line2D:
    """A line with its intervals, its marks smaller with the budget; as a legend shows it."""
    places = [_place(point) for point in line.points]
    axis.plot(*zip(*places), color=look["color"], linestyle=look.get("linestyle", "-"), linewidth=1.3, zorder=3)
    for point, size in zip(line.points, np.linspace(*_SIZES, max(len(places), 2))):
        x, y = _place(point)
        retained = _margins(y, point.retention_low, point.retention_high)
        speed = _margins(x, point.speedup_low, point.speedup_high)
        axis.errorbar(x, y, yerr=retained, xerr=speed, color=look["color"], linewidth=1, zorder=3)
        axis.plot(x, y, color=look["color"], marker=look["marker"], markersize=size, linestyle="none", zorder=4)
    return Line2D([], [], label=_written(line.name + mark(line.name)), linewidth=1.3, markersize=6, **look)


def _margins(middle: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """How far an interval reaches down and up; None where it is not known."""
    return None if low is None or high is None else [[middle - low], [high - middle]]


def _dress(axis: Axes, panel: _Panel, own: Sequence[Line2D], across: Across) -> None:
    axis.set_title(panel.title, loc="left", fontsize=10.5, fontweight="bold")
    axis.set_xlabel(f"{across.axis} (log scale)", fontsize=9)
    axis.tick_params(labelsize=9, labelbottom=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#efefef")
    axis.set_axisbelow(True)
    axis.legend(handles=own, loc="upper left", bbox_to_anchor=(-0.02, -0.19), ncols=panel.legend_columns, **_LEGEND)


def _dress_scale(axis: Axes, means: Sequence[Mean]) -> None:
    """The scale that all panels share."""
    ends = [end for mean in means if mean.method != NONE for end in (mean.speedup, mean.speedup_low, mean.speedup_high)]
    speeds = [1.0, *(end for end in ends if end is not None)]
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(speeds) / 1.15, max(speeds) * 1.15)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _frame(figure: Figure, title: str, common: Sequence[Line2D], caption: str) -> None:
    """The title, what is common to all panels, and the caption."""
    height = figure.get_figheight()
    figure.text(0.01, 1 - 0.08 / height, title, va="top", fontsize=11, fontweight="bold")
    figure.legend(handles=common, loc="upper left", bbox_to_anchor=(0, 1 - 0.28 / height), ncols=_SHARED_COLUMNS, **_LEGEND)
    figure.text(0.01, 0.08 / height, caption, va="bottom", fontsize=9, color="#444444")


def _caption(means: Sequence[Mean], across: Across) -> str:
    budgets = dict.fromkeys(keep_text(mean.keep) for mean in _ample_first(means) if mean.keep is not None)
    sizes = f"marks from large to small are keep {', '.join(budgets)}, or a method's settings; " if budgets else ""
    trained = footnote(mean.method for mean in means)
    said = f"Means over tasks; {sizes}bars are 95 % intervals; {across.caption}. {trained}"
    return fill(said.strip(), 118)
