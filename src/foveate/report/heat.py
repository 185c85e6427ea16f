"""Heat maps of a bench: methods by tasks, one for each budget and measure."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from foveate.bench.cells import keep_text
from foveate.bench.records import Record
from foveate.bench.summary import Mean

Value = Callable[[Record | Mean], float | None]

MEASURES: dict[str, Value] = {
    "score retained": lambda row: row.retention,
    "score": lambda row: row.score,
    "evidence recall": lambda row: row.evidence_recall,
}


Colour = tuple[int, int, int]
"""Red, green and blue, 0..255."""

RAMPS: dict[str, tuple[Colour, Colour]] = {
    "light": ((242, 244, 245), (10, 92, 156)),
    "dark": ((32, 37, 43), (143, 208, 255)),
}
"""The coldest and the warmest colour on a light and on a dark page."""
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class Box:
    """One number, its warmth in 0..1, and whether random selection with the same budget does as well."""

    value: float
    warmth: float
    weak: bool = False

    @property
    def style(self) -> str:
        """Its colour and that of its text as CSS, on a light and on a dark page."""
        grounds = [ground(ramp, self.warmth) for ramp in RAMPS.values()]
        texts = [_css(text_on(each)) for each in grounds]
        return f"background: light-dark({', '.join(map(_css, grounds))}); color: light-dark({', '.join(texts)})"


def ground(ramp: tuple[Colour, Colour], warmth: float) -> Colour:
    """The colour of a warmth."""
    red, green, blue = (round(cold + (warm - cold) * warmth) for cold, warm in zip(*ramp))
    return red, green, blue


def text_on(colour: Colour) -> Colour:
    """Black or white, whichever reads better: on any colour that is a contrast of 4.5 at least."""
    return max(_BLACK, _WHITE, key=lambda text: contrast(text, colour))


def contrast(one: Colour, other: Colour) -> float:
    """The ratio of two colours' luminances as WCAG 2 defines it, 1 to 21."""
    dark, light = sorted((_luminance(one), _luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def _luminance(colour: Colour) -> float:
    linear = [c / 12.92 if (c := part / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for part in colour]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _css(colour: Colour) -> str:
    return f"#{bytes(colour).hex()}"


def ramp_style() -> str:
    """The scale as CSS."""
    cold, warm = (f"light-dark({', '.join(_css(ramp[end]) for ramp in RAMPS.values())})" for end in (0, 1))
    return f"background: linear-gradient(90deg, {cold}, {warm})"


@dataclass(frozen=True)
class Band:
    """The boxes of a method: its mean over tasks, then each task; None where nothing is known."""

    method: str
    keep: str
    boxes: tuple[Box | None, ...]


@dataclass(frozen=True)
class HeatMap:
    """A measure at a budget, the best methods on top. ``low`` and ``high``: what the coldest and warmest colours mean."""

    measure: str
    keep: str
    tasks: tuple[str, ...]
    bands: tuple[Band, ...]
    low: float
    high: float


def maps(records: Sequence[Record], means: Sequence[Mean], weak: Collection[Record]) -> list[HeatMap]:
    """Every measure at every budget; methods without a budget stand in all of them."""
    keeps = list(dict.fromkeys(keep_text(record.keep) for record in records if record.keep is not None)) or [""]
    return [
        found
        for measure, value in MEASURES.items()
        for keep in keeps
        if (found := _map(measure, value, keep, records, means, {record.key for record in weak})) is not None
    ]


def _map(
    measure: str, value: Value, keep: str, records: Sequence[Record], means: Sequence[Mean], weak: Collection[object]
) -> HeatMap | None:
    known = [number for record in records if (number := value(record)) is not None]
    if not known:
        return None
    # One scale for all budgets, so that they compare.
    low, high = int(min(known) * 10) / 10, max(1.0, *known)
    tasks = tuple(dict.fromkeys(record.task for record in records))
    cells = {record.key: record for record in records}

    def box(row: Record | Mean | None, *, is_weak: bool) -> Box | None:
        number = None if row is None else value(row)
        return None if number is None else Box(number, (number - low) / (high - low) if high > low else 1.0, is_weak)

    bands = []
    for mean in means:
        own = keep_text(mean.keep)
        if own not in ("", keep):
            continue
        keys = [(task, mean.method, own) for task in tasks]
        boxes = (box(mean, is_weak=False), *(box(cells.get(key), is_weak=key in weak) for key in keys))
        bands.append(Band(mean.method, own, boxes))
    return HeatMap(measure, keep, tasks, tuple(sorted(bands, key=_warmth, reverse=True)), low, high)


def _warmth(band: Band) -> float:
    return band.boxes[0].warmth if band.boxes[0] else -1.0
