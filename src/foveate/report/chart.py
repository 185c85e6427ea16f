"""Line charts as geometry: what goes where. The template ``chart.html`` writes it down as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from foveate.report.looks import Look

_LEFT, _RIGHT, _TOP, _BOTTOM = 46, 14, 24, 42
"""Room around the plot for the numbers and names of the axes."""

_LABEL_HEIGHT, _LETTER = 15, 7.3
"""Roughly, of the text beside points."""

_DOUBLINGS = tuple(2.0**power * half for power in range(-6, 12) for half in (1, 1.5))


@dataclass(frozen=True)
class Axis:
    """Maps values to 0..1; ``show`` writes a value beside its tick."""

    label: str
    low: float
    high: float
    ticks: tuple[float, ...]
    show: Callable[[float], str]
    log: bool = False

    def at(self, value: float) -> float:
        """Where a value stands between the ends."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class Point:
    """A measurement: its place, what to say about it (one fact a line), intervals of ``y`` and ``x``, a name beside it."""

    x: float
    y: float
    tip: str
    interval: tuple[float, float] | None = None
    label: str = ""
    across: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """The points of one series; ``group`` is the budget that they belong to, where a page shows one budget at a time."""

    name: str
    look: Look
    points: tuple[Point, ...]
    group: str = ""

    @property
    def band(self) -> list[tuple[float, float]]:
        """The outline of the intervals of ``y``, there and back; empty where one is not known."""
        known = [(point.x, point.interval) for point in self.points if point.interval]
        if len(known) < len(self.points):
            return []
        return [(x, ends[0]) for x, ends in known] + [(x, ends[1]) for x, ends in reversed(known)]

    @property
    def xy(self) -> list[tuple[float, float]]:
        """The places of the points."""
        return [(point.x, point.y) for point in self.points]


@dataclass(frozen=True)
class Guide:
    """A horizontal line to compare with."""

    y: float
    label: str = ""


@dataclass(frozen=True)
class Chart:
    """A chart; ``front`` are points to connect behind the lines, ``dense`` draws markers as small dots."""

    title: str
    x: Axis
    y: Axis
    lines: tuple[Line, ...]
    guides: tuple[Guide, ...] = ()
    front: tuple[tuple[float, float], ...] = ()
    dense: bool = False
    width: int = 380
    height: int = 270
    caption: str = ""
    plot: tuple[int, int, int, int] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "plot", (_LEFT, _TOP, self.width - _RIGHT, self.height - _BOTTOM))

    def px(self, x: float) -> float:
        """A value of ``x`` in the units of the drawing."""
        left, _, right, _ = self.plot
        return round(left + (right - left) * self.x.at(x), 1)

    def py(self, y: float) -> float:
        """A value of ``y`` in the units of the drawing, which count downwards."""
        _, top, _, bottom = self.plot
        return round(bottom - (bottom - top) * self.y.at(y), 1)

    def path(self, points: Iterable[tuple[float, float]]) -> str:
        """A polyline through points."""
        return "M" + "L".join(f"{self.px(x)} {self.py(y)}" for x, y in points)

    @property
    def labels(self) -> list[tuple[float, float, str, Line]]:
        """The names to write beside points, where they do not run into each other, with the line that they belong to."""
        placed: list[tuple[float, float, str, Line]] = []
        named = [(self.px(p.x) + 9, self.py(p.y) - 6, p.label, line) for line in self.lines for p in line.points if p.label]
        for x, y, text, line in sorted(named, key=lambda each: each[1]):
            end = x + _LETTER * len(text)
            hits = any(abs(y - v) < _LABEL_HEIGHT and x < u + _LETTER * len(t) and u < end for u, v, t, _ in placed)
            if not hits and end <= self.width:
                placed.append((x, y, text, line))
        return placed


def linear(label: str, values: Iterable[float], show: Callable[[float], str] = "{:g}".format, *, zero: bool = False) -> Axis:
    """An axis from one round number to another, with all values between; ``zero``: beginning at 0."""
    known = list(values) or [0.0]
    low, high = (min(0.0, *known) if zero else min(known)), max(known)
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = _round_step((high - low) / 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(number * step, 12) for number in range(first, last + 1))
    return Axis(label, ticks[0], ticks[-1], ticks, show)


def counting(label: str, numbers: int) -> Axis:
    """An axis of the whole numbers from 0."""
    every = max(1, math.ceil((numbers - 1) / 6))
    return Axis(label, 0, max(1, numbers - 1), tuple(range(0, numbers, every)), "{:g}".format)


def ratios(label: str, values: Iterable[float], show: Callable[[float], str]) -> Axis:
    """A logarithmic axis around the values and 1; there is room at the upper end, for names."""
    known = [1.0, *values]
    low, high = min(known) / 1.1, max(known) * 1.12
    inside = [tick for tick in _DOUBLINGS if low <= tick <= high]
    whole = [tick for tick in inside if math.log2(tick).is_integer()]
    return Axis(label, low, high, tuple(inside if len(inside) <= 7 else whole), show, log=True)


def _round_step(least: float) -> float:
    power = 10.0 ** math.floor(math.log10(least))
    return next(step * power for step in (1, 2, 2.5, 5, 10) if step * power >= least * (1 - 1e-9))
