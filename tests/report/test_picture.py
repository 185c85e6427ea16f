"""The picture of a bench: a panel for each place, in which nothing is drawn twice alike."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.figure import Figure
from PIL import Image

from foveate.bench.summary import Mean
from foveate.report.across import CACHE
from foveate.report.picture import draw_quality

POINT = Mean("none", None, 2, 1.0, 1.0, None, None, 1.0, None, None, retention_low=0.98, retention_high=1.0)
KEEPS = (0.33, 0.22, 0.11)
IN_LLM = ("alvts", "fastv", "feather", "hidrop", "ivc_prune", "shortv", "transprune", "v2drop")


def point(method: str, keep: float | None = None, speedup: float = 2.0, retention: float = 0.9) -> Mean:
    margins = {"retention_low": retention - 0.02, "retention_high": retention + 0.03}
    return replace(POINT, method=method, keep=keep, speedup=speedup, retention=retention, **margins)


def over_budgets(*methods: str) -> list[Mean]:
    return [point(method, keep, 1 / keep, 0.5 + keep) for method in methods for keep in KEEPS]


@pytest.fixture
def drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Draws, and gives the figure that was saved."""
    figures: list[Figure] = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))[1])

    def draw(means: list[Mean]) -> Figure:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_quality(means, tmp_path / "picture.png", "made up: 2 tasks, 10 questions each")
        return figures[-1]

    return draw


def panels(figure: Figure) -> dict[str, list[str]]:
    """Names in the legend of each panel, by its title."""
    legends = {axes.get_title(loc="left"): axes.get_legend() for axes in figure.axes if axes.axison}
    return {title: [text.get_text() for text in legend.get_texts()] for title, legend in legends.items()}


def test_each_place_has_a_panel_in_the_order_in_which_a_picture_passes_them(drawn) -> None:
    methods = ("snapkv(window=8)", "fastv", "scope", "tome", "scope + fastv(layer=2)", "of_another_package")

    figure = drawn([POINT, *over_budgets("random", "uniform", *methods)])

    assert panels(figure) == {
        "in the encoder": ["tome"],
        "before the LLM": ["scope"],
        "in the LLM": ["fastv"],
        "KV cache": ["snapkv(window=8)"],
        "several places": ["scope + fastv(layer=2)"],
        "elsewhere": ["of_another_package"],
    }


def test_the_baselines_are_in_every_panel(drawn) -> None:
    figure = drawn([POINT, *over_budgets("random", "uniform", "scope", "fastv", "tome")])

    shown = [axes for axes in figure.axes if axes.axison]
    assert len(shown) == 3
    for axes in shown:
        grey = [line for line in axes.get_lines() if line.get_color() == "#808080" and len(line.get_xdata()) == len(KEEPS)]
        assert sorted(line.get_linestyle() for line in grey) == ["--", ":"]
    (common,) = figure.legends
    assert [text.get_text() for text in common.get_texts()][2:] == ["random", "uniform"]


@pytest.mark.parametrize("methods", [IN_LLM, [f"fastv(layer={layer})" for layer in range(1, 31)]])
def test_colours_are_unique_within_a_panel(drawn, methods: list[str]) -> None:
    figure = drawn([POINT, *over_budgets(*methods)])

    names = []
    for axes in filter(lambda axes: axes.axison, figure.axes):
        handles = axes.get_legend().legend_handles
        assert max(Counter(handle.get_color() for handle in handles).values()) == 1
        names += [text.get_text().removesuffix(" †") for text in axes.get_legend().get_texts()]
    assert names == list(methods)


def test_settings_of_one_method_share_a_line(drawn) -> None:
    figure = drawn([POINT, *(point(f"shortv(frozen=0.{number})", None, number, 0.9) for number in (4, 6, 8))])

    assert panels(figure) == {"in the LLM": ["shortv"]}


def test_intervals_are_drawn_both_ways_where_they_are_known(drawn) -> None:
    timed = replace(point("scope", 0.5), speedup_low=1.8, speedup_high=2.3)

    figure = drawn([POINT, timed, point("fastv", 0.5)])

    segments = [
        {tuple(map(tuple, segment.round(2))) for bars in axes.collections for segment in bars.get_segments()}
        for axes in figure.axes
    ]
    assert ((2.0, 0.88), (2.0, 0.93)) in segments[0]
    assert ((1.8, 0.9), (2.3, 0.9)) in segments[0]
    assert segments[1] == {((2.0, 0.88), (2.0, 0.93))}


def test_nothing_is_too_small_to_read_in_a_readme(drawn, tmp_path: Path) -> None:
    figure = drawn([POINT, *over_budgets("random", *IN_LLM, "snapkv(window=8)")])

    assert figure.get_figwidth() == 8
    texts = [text for axes in figure.axes for text in (*axes.get_xticklabels(), *axes.get_yticklabels(), axes.title)]
    texts += [text for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    assert min(text.get_fontsize() for text in texts + figure.texts) >= 9
    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        assert picture.width == 1600


def test_methods_that_need_training_are_marked(drawn) -> None:
    figure = drawn([POINT, point("hidrop")])

    assert panels(figure) == {"in the LLM": ["hidrop †"]}
    assert any("† needs training" in text.get_text().replace("\n", " ") for text in figure.texts)


def test_a_picture_without_a_single_point_is_still_drawn(drawn, tmp_path: Path) -> None:
    drawn([])

    assert (tmp_path / "picture.png").is_file()


def test_memory_may_be_the_scale(tmp_path: Path, drawn) -> None:
    drawn([POINT])  # what saves figures is watched
    means = [
        replace(POINT, kv_bytes=100.0),
        *(replace(each, kv_bytes=100 * each.keep) for each in over_budgets("snapkv(window=8)")),
    ]
    draw_quality(means, tmp_path / "cache.png", "made up", CACHE)
    with Image.open(tmp_path / "cache.png") as picture:
        assert picture.size[0] == 1600
