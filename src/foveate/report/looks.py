"""How methods look, the same in every chart of a page: told apart by colour, by marker and by dashes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from foveate.core.recipe import NONE
from foveate.report.places import by_place

COLOURS = 8
"""Colours in the page's style sheet, which follow Okabe and Ito, and a violet: told apart by colour-blind readers too."""

MARKERS = (
    "M0-4.6A4.6 4.6 0 1 0 0 4.6 4.6 4.6 0 1 0 0-4.6Z",
    "M-4-4H4V4H-4Z",
    "M0-5.2L5 4H-5Z",
    "M0-5.6L5 0 0 5.6-5 0Z",
    "M0 5.2L5-4H-5Z",
    "M-1.8-5H1.8V-1.8H5V1.8H1.8V5H-1.8V1.8H-5V-1.8H-1.8Z",
    "M0-5.6L1.6-1.9 5.5-1.8 2.5.9 3.4 4.7 0 2.6-3.4 4.7-2.5.9-5.5-1.8-1.6-1.9Z",
    "M-4-4L4 4M4-4L-4 4",
    "M0-5V5M-5 0H5",
    "M0-6L5.2-3V3L0 6-5.2 3V-3Z",
    "M-5-2H5L0 5Z",
    "M-5-3H5V3H-5Z",
)
"""Paths around the origin; the last five are for ``random``, ``uniform``, the unmodified model, ``downsample``, ``pool``."""


@dataclass(frozen=True)
class Look:
    """Style sheet class of the colour, number of the marker, dashes of the line (as in SVG; none for a solid one)."""

    colour: str
    marker: int
    dashes: str = ""


_MARKERS = len(MARKERS) - 5
_REFERENCES = {
    NONE: Look("ink", 9),
    "random": Look("grey", 7, "5 4"),
    "random_kv": Look("grey", 7, "2 2 6 2"),
    "uniform": Look("grey", 8, "1.5 3.5"),
    "downsample": Look("grey", 10, "9 3"),
    "pool": Look("grey", 11, "9 3 2 3"),
}
_DASHES = ("", "7 3", "2 3", "9 3 2 3")


def looks(names: Iterable[str]) -> dict[str, Look]:
    """A look for each name, in the order given."""
    return {name: _own(number) for number, name in enumerate(dict.fromkeys(names))}


def method_looks(methods: Iterable[str]) -> dict[str, Look]:
    """A look for each method, place by place: colours are unique within a place, colour and marker within a page.

    The points of reference come first and always look the same.
    """
    every = list(dict.fromkeys(methods))
    found = {name: look for name, look in _REFERENCES.items() if name in every}
    for place, names in enumerate(by_place(every, str).values()):
        found |= {name: _own(number, shift=place) for number, name in enumerate(names)}
    return found


def _own(number: int, shift: int = 0) -> Look:
    # In a second round through the colours the markers are shifted, and the lines dashed.
    round_, place = divmod(number, COLOURS)
    return Look(f"c{place}", (place + shift + round_) % _MARKERS, _DASHES[round_ % len(_DASHES)])
