"""Charts as geometry, and the maps and verdicts beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foveate.bench.records import Record
from foveate.bench.summary import Mean, front
from foveate.core import registry
from foveate.report.across import CACHE, SPEED, across
from foveate.report.bench_charts import mean_charts, task_charts
from foveate.report.chart import Chart, Line, Point, counting, linear, ratios
from foveate.report.heat import RAMPS, Box, contrast, ground, maps, text_on
from foveate.report.looks import COLOURS, MARKERS, looks, method_looks
from foveate.report.places import by_place
from foveate.report.story import by_method, offers, rankings


def mean(method: str, keep: float | None, retention: float, speedup: float, tasks: int = 2) -> Mean:
    return Mean(method, keep, tasks, retention, retention, None, None, speedup, None, None)


def record(task: str, method: str, keep: float | None, score: float) -> Record:
    return Record("m", task, method, keep, 10, 0, score, 0, 1, score, *[None] * 6)


def test_the_front_is_what_nothing_beats_in_both() -> None:
    assert front([(1, 1.0), (2, 0.9), (2, 0.8), (3, 0.9), (4, 0.2), (3.5, 0.1)]) == [(1, 1.0), (3, 0.9), (4, 0.2)]


@pytest.mark.parametrize("values", [[0.3, 0.97], [5.0], [0.0, 0.0], [-3.0, 1e6], [1e-9, 3e-9], []])
def test_a_linear_axis_reaches_from_tick_to_tick_around_all_values(values: list[float]) -> None:
    axis = linear("", values)

    assert all(-1e-9 <= axis.at(value) <= 1 + 1e-9 for value in values)
    assert (axis.low, axis.high) == (axis.ticks[0], axis.ticks[-1])
    assert 2 <= len(axis.ticks) <= 8


@pytest.mark.parametrize("values", [[], [0.9, 7.1], [1.05], [300.0]])
def test_an_axis_of_ratios_holds_1_and_few_ticks(values: list[float]) -> None:
    axis = ratios("", values, str)

    assert 1 in axis.ticks
    assert all(0 < axis.at(value) < 1 for value in values)
    assert len(axis.ticks) <= 9


def test_an_axis_of_one_layer_is_no_division_by_zero() -> None:
    assert counting("layer", 1).at(0) == 0


def test_points_are_drawn_inside_the_plot_and_up_is_more() -> None:
    chart = Chart("", linear("", [0, 1]), linear("", [0, 1]), ())
    left, top, right, bottom = chart.plot

    assert (chart.px(0), chart.px(1), chart.py(0), chart.py(1)) == (left, right, bottom, top)


def test_names_do_not_run_into_each_other() -> None:
    look = looks(["a"])["a"]
    points = tuple(Point(0.2, y, "", label="a long name") for y in (0.5, 0.501, 0.9))

    chart = Chart("", linear("", [0, 1]), linear("", [0, 1]), (Line("a", look, points),))

    assert len(chart.labels) == 2


def test_as_many_methods_as_there_are_look_different() -> None:
    found = method_looks(["none", "random", "uniform", *(f"fastv(layer={i})" for i in range(1, 4 * COLOURS + 1))])

    assert len(set(found.values())) == len(found)
    assert all(look.marker < len(MARKERS) for look in found.values())


def test_colours_are_unique_within_a_place_and_markers_tell_places_apart() -> None:
    found = method_looks(registry.methods())

    places = by_place(found, str)
    assert len(places) == 6
    for names in places.values():
        assert len({found[name].colour for name in names}) == min(len(names), COLOURS)
    assert len(set(found.values())) == len(found)


def test_each_place_has_a_chart_with_the_baselines_on_the_same_axes() -> None:
    over_tasks = [
        mean("none", None, 1, 1),
        mean("random", 0.5, 0.6, 2),
        replace(mean("scope", 0.5, 0.8, 2), retention_low=0.7, retention_high=0.9, speedup_low=1.5, speedup_high=3.0),
        mean("fastv", 0.5, 0.7, 1.5),
    ]

    charts = mean_charts(over_tasks, method_looks(each.method for each in over_tasks))

    assert [chart.title for chart in charts] == ["Before the LLM", "In the LLM"]
    assert [{line.name for line in chart.lines} - {"none", "random"} for chart in charts] == [{"scope"}, {"fastv"}]
    assert len({(chart.x.low, chart.x.high, chart.y.low, chart.y.high) for chart in charts}) == 1
    (scope,) = (line.points[0] for line in charts[0].lines if line.name == "scope")
    assert (scope.interval, scope.across) == ((0.7, 0.9), (1.5, 3.0))
    assert "score retained 80.0 % [70.0, 90.0] (mean of 2)\nspeed-up 2.00x [1.50, 3.00]" in scope.tip


def test_a_line_has_a_band_where_all_its_intervals_are_known() -> None:
    look = looks(["a"])["a"]
    points = (Point(0, 0.5, "", (0.4, 0.6)), Point(1, 0.7, "", (0.5, 0.8)))

    assert Line("a", look, points).band == [(0, 0.4), (1, 0.5), (1, 0.8), (0, 0.6)]
    assert Line("a", look, (*points, Point(2, 0.5, ""))).band == []


@pytest.mark.parametrize("scheme", RAMPS)
def test_text_on_every_colour_of_a_heat_map_is_readable(scheme: str) -> None:
    for step in range(1001):
        colour = ground(RAMPS[scheme], step / 1000)
        assert contrast(text_on(colour), colour) >= 4.5


def test_contrast_is_that_of_wcag() -> None:
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((118, 118, 118), (255, 255, 255)) == pytest.approx(4.54, abs=0.005)


def test_a_box_has_its_colours_on_light_and_dark_pages() -> None:
    assert Box(0.0, 0.0).style == "background: light-dark(#f2f4f5, #20252b); color: light-dark(#000000, #ffffff)"
    assert Box(1.0, 1.0).style == "background: light-dark(#0a5c9c, #8fd0ff); color: light-dark(#ffffff, #000000)"


def test_the_best_of_a_budget_are_ranked_beside_random() -> None:
    over_tasks = [
        mean("none", None, 1, 1),
        mean("random", 0.5, 0.6, 2),
        mean("a", 0.5, 0.8, 2),
        mean("b", 0.5, 0.9, 2),
        mean("half", 0.5, 1.0, 2, tasks=1),
    ]

    (ranking,) = rankings(over_tasks)

    assert (ranking.keep, [each.method for each in ranking.best]) == ("0.5", ["b", "a"])
    assert ranking.random is over_tasks[1]


def test_the_fastest_within_a_loss_is_found() -> None:
    found = offers([mean("slow", 0.5, 0.995, 1.5), mean("fast", 0.2, 0.96, 4.0), mean("slower", 0.5, 1.0, 0.9)])

    assert [(offer.loss, offer.fastest and offer.fastest.method) for offer in found] == [
        (0.01, "slow"),
        (0.02, "slow"),
        (0.05, "fast"),
        (0.10, "fast"),
    ]


def test_results_are_grouped_by_method_the_longest_list_first() -> None:
    weak = [record("x", "a", 0.5, 0), record("x", "b", 0.5, 0), record("x", "b", 0.2, 0), record("y", "b", 0.2, 0)]

    assert list(by_method(weak).items()) == [("b", {"x": ["0.5", "0.2"], "y": ["0.2"]}), ("a", {"x": ["0.5"]})]


def test_a_heat_map_shows_one_budget_with_the_best_on_top() -> None:
    records = [
        record("x", "none", None, 1.0),
        record("x", "a", 0.5, 0.4),
        record("x", "b", 0.5, 0.7),
        record("x", "b", 0.2, 0.5),
    ]
    over_tasks = [mean(each.method, each.keep, each.score, 1, tasks=1) for each in records]

    found = {(map_.measure, map_.keep): map_ for map_ in maps(records, over_tasks, [records[1]])}

    shown = found["score retained", "0.5"]
    assert [band.method for band in shown.bands] == ["none", "b", "a"]
    assert [band.boxes[1].weak for band in shown.bands if band.boxes[1]] == [False, False, True]
    assert (shown.low, shown.high) == (0.4, 1.0)
    assert set(found) == {(measure, keep) for measure in ("score retained", "score") for keep in ("0.5", "0.2")}


def test_without_pictures_scores_are_drawn_against_the_size_of_the_cache() -> None:
    seen = [record("text", "none", None, 1.0), record("text", "h2o", 0.5, 0.9), record("text", "h2o", 0.25, 0.4)]
    sizes = [replace(each, visual_tokens=0.0, kv_bytes=size, speedup=1.0) for each, size in zip(seen, (800.0, 400.0, 200.0))]

    assert across(sizes) is CACHE
    (chart,) = task_charts(CACHE.of(sizes), {}, method_looks(["none", "h2o"]), CACHE)
    assert chart.x.label == "how many times smaller the cache is (log scale)"
    assert [line.xy for line in chart.lines] == [[(2, 0.9), (4, 0.4)], [(1, 1.0)]]
    assert "cache 4.00x smaller (200 B a question)" in chart.lines[0].points[1].tip
    assert chart.front == ((1, 1.0), (2, 0.9), (4, 0.4))


def test_where_the_model_sees_pictures_it_is_speed() -> None:
    # A method may leave no visual token at the end.
    seen = [replace(record("shape", "none", None, 1.0), visual_tokens=9.0), record("shape", "evs", None, 0.5)]

    assert across([seen[0], replace(seen[1], visual_tokens=0.0)]) is SPEED
