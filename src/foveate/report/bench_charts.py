"""The charts of a bench: quality against speed or memory, and what is left in each layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from statistics import fmean
from typing import Any

from foveate.bench.cells import REFERENCE_POINTS, keep_text
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.summary import Mean, front
from foveate.core.recipe import NONE
from foveate.report.across import SPEED, Across
from foveate.report.chart import Chart, Guide, Line, Point, counting, linear, ratios
from foveate.report.looks import Look, looks
from foveate.report.numbers import factor, fixed, percent, size
from foveate.report.places import by_place

Looks = Mapping[str, Look]


def mean_charts(
    means: Sequence[Mean], look: Looks, across: Across = SPEED, width: int = 380, height: int = 300
) -> list[Chart]:
    """Score retained against the ratio that is ``across``, the mean over tasks: a chart for each place.

    All have the points of reference, the same axes and the front of the whole, whose names stand beside their points.
    """
    known = [mean for mean in means if mean.retention is not None]
    best = mean_front(known)

    def point(mean: Mean) -> Point:
        at = (mean.speedup, mean.retention or 0.0)
        retained, reach = _ends(mean.retention_low, mean.retention_high), _ends(mean.speedup_low, mean.speedup_high)
        named = _named(mean.method, mean.keep)
        tip = f"score retained {percent(mean.retention)} %{_between(retained)} (mean of {mean.tasks})"
        said = f"{named}\n{tip}\n{_cost(mean.speedup, reach, mean, across)}"
        label = named if mean.method == NONE else " · ".join(filter(None, (_short(mean.method, 20), keep_text(mean.keep))))
        return Point(*at, said, retained, label if at in best or mean.method == NONE else "", reach)

    references = [mean for mean in known if mean.method in REFERENCE_POINTS]
    return [
        Chart(
            title=f"{place[0].upper()}{place[1:]}",
            x=ratios(f"{across.axis} (log scale)", [end for mean in known for end in _reach(mean)], _times),
            y=linear("score retained", [1.0, *(end for mean in known for end in _retained(mean))], _share),
            lines=_lines([*references, *rows], look, point),
            guides=(Guide(1.0),),
            front=tuple(best),
            width=width,
            height=height,
        )
        for place, rows in (by_place(known, lambda mean: mean.method) or {"baselines": []}).items()
    ]


def mean_front(means: Sequence[Mean]) -> list[tuple[float, float]]:
    """Speed-up and retention of the means that no other beats; a mean over fewer tasks does not compare with the others."""
    most = max((mean.tasks for mean in means), default=0)
    return front([(mean.speedup, mean.retention) for mean in means if mean.tasks == most and mean.retention is not None])


def task_charts(
    records: Sequence[Record], notes: Mapping[str, Mapping[str, Any]], look: Looks, across: Across = SPEED
) -> list[Chart]:
    """Score against the ratio that is ``across`` for each task, all on the same axes."""
    speedups = {record.key: record.speedup for record in records if record.speedup is not None}

    def point(record: Record) -> Point:
        score, reach = (record.score_low, record.score_high), _ends(record.speedup_low, record.speedup_high)
        tip = f"score {percent(record.score)} %{_between(score)}\n{_cost(speedups[record.key], reach, record, across)}"
        named = f"{_named(record.method, record.keep)}\n{tip}"
        return Point(speedups[record.key], record.score, named, score, across=reach)

    ends = [end for record in records if record.key in speedups for end in _reach(record)]
    charts = []
    for task in dict.fromkeys(record.task for record in records):
        rows = [record for record in records if record.task == task and record.key in speedups]
        note = notes.get(task)
        charts.append(
            Chart(
                title=task,
                caption="below floor" if note and note["below_floor"] else "",
                x=ratios(f"{across.axis} (log scale)", ends, _times),
                y=linear("score", (0.0, 1.0), _share),
                lines=_lines(rows, look, point),
                guides=(Guide(note["majority_score"], f"always “{_short(note['majority_answer'], 14)}”"),) if note else (),
                front=tuple(front([(speedups[record.key], record.score) for record in rows])),
            )
        )
    return charts


@dataclass(frozen=True)
class _ByLayer:
    """A list of a `Measurement`, one number for each decoder layer, to be shown in a unit."""

    name: str
    title: str
    unit: str
    size: float = 1.0


_BY_LAYER = (
    _ByLayer("visual_by_layer", "Visual tokens entering each layer", "tokens"),
    _ByLayer("kv_by_layer", "Cache of a question in each layer", "KiB", 1024),
    _ByLayer("evidence_by_layer", "Evidence entering each layer", "% of its cells", 0.01),
)


def layer_charts(folder: Results, look: Looks) -> list[Chart]:
    """Tokens, cache and evidence in each decoder layer, means over tasks; nothing where there is none."""
    details: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in folder.records:
        details.setdefault((record.method, keep_text(record.keep)), []).append(folder.details(record))
    charts = []
    for what in _BY_LAYER:
        layers = {key: _over_tasks([cell.get(what.name, []) for cell in cells]) for key, cells in details.items()}
        lines = [_layer_line(method, keep, values, what, look) for (method, keep), values in layers.items()]
        if any(point.y for line in lines for point in line.points):
            x = counting("decoder layer", max(map(len, layers.values())))
            y = linear(what.unit, [point.y for line in lines for point in line.points], zero=True)
            charts.append(Chart(what.title, x, y, tuple(line for line in lines if line.points), dense=True))
    return charts


def probe_chart(figure: Mapping[str, Any]) -> Chart:
    """A figure of ``{"title", "caption", "series": [{"name", "x", "y"}], "x_label", "y_label"}``.

    A series may have the ends of intervals as ``low`` and ``high``.
    """
    look = looks(series["name"] for series in figure["series"])
    # What is named first is drawn on top.
    lines = tuple(_probe_line(series, figure, look) for series in reversed(figure["series"]))
    points = [point for line in lines for point in line.points]
    heights = [end for point in points for end in (point.y, *(point.interval or ()))]
    return Chart(
        title=figure["title"],
        caption=figure.get("caption", ""),
        x=linear(figure["x_label"], [point.x for point in points]),
        y=linear(figure["y_label"], heights),
        lines=lines,
        dense=True,
    )


def _probe_line(series: Mapping[str, Any], figure: Mapping[str, Any], look: Looks) -> Line:
    points = []
    ends = zip(series["low"], series["high"]) if series.get("low") else repeat(None)
    for x, y, interval in zip(series["x"], series["y"], ends):
        if y is not None:
            tip = f"{series['name']}\n{figure['x_label']} {x:g}\n{figure['y_label']} {y:.4g}"
            points.append(Point(float(x), float(y), tip, interval))
    return Line(series["name"], look[series["name"]], tuple(points))


def _lines(rows: Sequence[Any], look: Looks, point: Callable[[Any], Point]) -> tuple[Line, ...]:
    """A line for each method over its budgets, what is to be on top last."""
    methods: dict[str, list[Point]] = {}
    for row in rows:
        methods.setdefault(row.method, []).append(point(row))
    return tuple(Line(method, look[method], tuple(points)) for method, points in reversed(methods.items()))


def _layer_line(method: str, keep: str, values: Sequence[float | None], what: _ByLayer, look: Looks) -> Line:
    named = f"{method} · keep {keep}" if keep else method
    known = [(layer, value / what.size) for layer, value in enumerate(values) if value is not None]
    points = (Point(layer, value, f"{named}\nlayer {layer}: {value:.1f} {what.unit}") for layer, value in known)
    return Line(method, look[method], tuple(points), group=keep)


def _over_tasks(layers: Sequence[Sequence[float | None]]) -> list[float | None]:
    """The mean of each layer over the tasks in which it is known."""
    known = [[value for value in layer if value is not None] for layer in zip(*filter(None, layers))]
    return [fmean(values) if values else None for values in known]


def _ends(low: float | None, high: float | None) -> tuple[float, float] | None:
    return None if low is None or high is None else (low, high)


def _reach(row: Mean | Record) -> list[float]:
    """A speed-up and the ends of its interval, as far as they are known."""
    return [value for value in (row.speedup, row.speedup_low, row.speedup_high) if value is not None]


def _retained(mean: Mean) -> list[float]:
    """What is retained and the ends of its interval, as far as they are known."""
    return [value for value in (mean.retention, mean.retention_low, mean.retention_high) if value is not None]


def _between(ends: tuple[float, float] | None, unit: float = 100) -> str:
    """An interval to stand behind its number."""
    digits = 1 if unit == 100 else 2
    return f" [{unit * ends[0]:.{digits}f}, {unit * ends[1]:.{digits}f}]" if ends else ""


def _named(method: str, keep: object) -> str:
    if method == NONE:
        return "unmodified model"
    return method if keep is None else f"{method} · keep {keep}"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _cost(ratio: float, ends: tuple[float, float] | None, row: Mean | Record, across: Across) -> str:
    """What a point of this ratio saves, in two lines."""
    said = across.tip.format(factor(ratio)) + _between(ends, 1)
    if across.of_cache:
        return f"{said} ({size(row.kv_bytes)} a question)\n{fixed(row.decode_rate, 0)} tokens/s in decoding"
    return f"{said}\n{fixed(row.visual_tokens, 1)} visual tokens in the last layer"


def _share(value: float) -> str:
    return f"{100 * value:g} %"


def _times(value: float) -> str:
    return f"{value:g}×"
