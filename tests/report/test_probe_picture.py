"""The picture of a probe: every band that its caption promises, no text over other text."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from foveate.bench.probes import Chart, Series
from foveate.report.probe_picture import draw_probe

LAYERS = tuple(range(5))


def chart(curves: int) -> Chart:
    y, low, high = ((level,) * len(LAYERS) for level in (0.5, 0.4, 0.6))
    series = tuple(Series(f"curve {number}", LAYERS, y, low, high) for number in range(curves))
    return Chart(
        "A title as long as those of the probes are", "Bands are 95 % intervals. " * 6, "decoder layer", "score", series
    )


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws, and gives the figure that was saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])

    def draw(charts: list[Chart]) -> Figure:
        draw_probe(charts, tmp_path / "probe.png", "a probe of a model")
        return figures[-1]

    return draw


@pytest.mark.parametrize("curves", [1, 4, 5, 19])
def test_every_curve_has_its_band(drawn, curves: int) -> None:
    figure = drawn([chart(curves)])

    drawn_bands = sum(len(axes.collections) for axes in figure.axes)
    # Where each curve has its own plot, the first stands in all of them.
    assert drawn_bands == (curves if curves <= 4 else 2 * (curves - 1))


def test_titles_captions_and_axes_do_not_collide(drawn) -> None:
    figure = drawn([chart(7), chart(2), chart(3)])
    renderer = FigureCanvasAgg(figure).get_renderer()

    boxes = [text.get_window_extent(renderer) for part in figure.subfigs for text in (*part.texts, *_titles(part))]
    boxes += [text.get_window_extent(renderer) for text in figure.texts]
    assert all(not one.overlaps(other) for number, one in enumerate(boxes) for other in boxes[:number])
    plots = [axes.get_tightbbox(renderer) for axes in figure.axes if axes.axison]
    assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width and box.y0 >= 0 for box in plots)
    for part in figure.subfigs:
        below = max(box.y1 for box in (text.get_window_extent(renderer) for text in part.texts[1:]))
        assert all(axes.get_tightbbox(renderer).y0 >= below - 1 for axes in part.axes if axes.axison)


def _titles(part):
    return [axes._left_title for axes in part.axes if axes.axison and axes.get_title(loc="left")]


def test_charts_stand_below_each_other(drawn) -> None:
    figure = drawn([chart(2), chart(2)])

    assert figure.get_figwidth() == 8
    tops = [part.bbox.y1 for part in figure.subfigs]
    assert all(upper > lower for upper, lower in pairwise(tops))
