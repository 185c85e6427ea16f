"""The picture of a probe: its charts side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from foveate.bench.probes import Chart, Series
from foveate.report.picture_looks import picture_look

_WIDTH = 7.4
_FEW = 4
"""More bands than this hide each other: then only the first curve, which is the mean, has one."""


def draw_probe(charts: Sequence[Chart], path: Path, title: str) -> None:
    """Draw the charts as PNG."""
    figure = Figure(figsize=(_WIDTH * len(charts), 5.6), dpi=120, layout="constrained")
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    for axes, chart in zip(figure.subplots(1, len(charts), squeeze=False)[0], charts):
        _draw(axes, chart)
    figure.savefig(path, format="png")


def _draw(axes: Axes, chart: Chart) -> None:
    for number, series in enumerate(chart.series):
        _draw_series(axes, series, number, band=number == 0 or len(chart.series) <= _FEW)
    axes.set_title(chart.title, loc="left", fontsize=10.5)
    axes.set_xlabel(f"{chart.x_label}\n\n{fill(chart.caption, 88)}", fontsize=8, loc="left")
    axes.set_ylabel(chart.y_label, fontsize=9)
    if all(float(x).is_integer() for series in chart.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#f0f0f0")
    axes.set_axisbelow(True)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8)


def _draw_series(axes: Axes, series: Series, number: int, band: bool) -> None:
    look, width = picture_look(number), 2.4 if number == 0 else 1.3
    axes.plot(series.x, series.y, label=series.name, linewidth=width, markersize=4.5, **look)
    if band and series.low:
        axes.fill_between(series.x, series.low, series.high, color=look["color"], alpha=0.12, linewidth=0)
