"""The picture of a probe: its charts below each other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator

from foveate.bench.probes import Chart, Series
from foveate.report.picture_looks import PictureLook, picture_look

_WIDTH = 8.0
"""Inches; at the 800 pixels of a README's column, nine points are letters of twelve pixels."""
_FEW = 4
"""More curves than this, and each but the first has a panel of its own, in which the first stands to compare with."""
_COLUMNS = 3
_PLOT, _SMALL, _TEXT_ROW = 2.6, 1.75, 0.165
"""Heights in inches: of one plot for all curves, of a small one for one curve, of a row of text."""
_LETTERS, _BELOW, _BESIDE = 112, 26, 18
"""Letters of a row of text, and of one below and beside a small plot."""
_BEHIND: PictureLook = {"color": "#9a9a9a", "linestyle": "-", "marker": ""}


def draw_probe(charts: Sequence[Chart], path: Path, title: str) -> None:
    """Draw the charts as PNG."""
    heights = [_height(chart) for chart in charts]
    figure = Figure(figsize=(_WIDTH, sum(heights) + 0.4), dpi=200)
    figure.set_layout_engine("constrained", rect=(0, 0, 1, 1 - 0.35 / figure.get_figheight()))
    figure.text(0.01, 1 - 0.08 / figure.get_figheight(), title, va="top", fontsize=12, fontweight="bold")
    parts = figure.subfigures(len(charts), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, chart in zip(parts, charts):
        _draw(part, chart)
    figure.savefig(path, format="png")


def _small_multiples(chart: Chart) -> bool:
    return len(chart.series) > _FEW


def _rows(chart: Chart) -> int:
    """Rows of plots."""
    return -(-(len(chart.series) - 1) // _COLUMNS) if _small_multiples(chart) else 1


def _height(chart: Chart) -> float:
    plots = _rows(chart) * _SMALL if _small_multiples(chart) else _PLOT
    return plots + _TEXT_ROW * (_caption(chart).count("\n") + 1) + 0.75


def _caption(chart: Chart) -> str:
    compared = f"Grey: {chart.series[0].name}. " if _small_multiples(chart) else ""
    return fill(compared + chart.caption, _LETTERS)


def _draw(part: SubFigure, chart: Chart) -> None:
    """A chart: title, plots, caption."""
    part.suptitle(chart.title, x=0.01, ha="left", fontsize=10.5, fontweight="bold")
    part.supxlabel(_caption(chart), x=0.01, ha="left", fontsize=9, color="#444444")
    if not _small_multiples(chart):
        axis = part.subplots()
        for number, series in enumerate(chart.series):
            _draw_series(axis, series, picture_look(number))
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=9)
        _dress(axis, chart)
        axis.set_xlabel(chart.x_label, fontsize=9)
        axis.set_ylabel(chart.y_label, fontsize=9)
        return
    axes = part.subplots(_rows(chart), _COLUMNS, squeeze=False, sharex=True, sharey=True)
    first, *others = chart.series
    for axis in axes.flat[len(others) :]:
        axis.set_axis_off()
    for axis, series in zip(axes.flat, others):
        _draw_series(axis, first, _BEHIND)
        _draw_series(axis, series, picture_look(0))
        axis.set_title(series.name, loc="left", fontsize=9)
        _dress(axis, chart)
    for axis in axes[:, 0]:
        axis.set_ylabel(fill(chart.y_label, _BESIDE), fontsize=9)
    for column in axes.T:
        lowest = [axis for axis in column if axis.axison][-1]
        lowest.set_xlabel(fill(chart.x_label, _BELOW), fontsize=9)


def _draw_series(axis: Axes, series: Series, look: PictureLook) -> None:
    """A curve and the band of its intervals."""
    axis.plot(series.x, series.y, label=series.name, linewidth=1.6, markersize=4, **look)
    if series.low:
        axis.fill_between(series.x, series.low, series.high, color=look["color"], alpha=0.15, linewidth=0)


def _dress(axis: Axes, chart: Chart) -> None:
    axis.tick_params(labelsize=9, labelbottom=True)
    if all(float(x).is_integer() for series in chart.series for x in series.x):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#efefef")
    axis.set_axisbelow(True)
