"""How lines look in pictures, told apart by colour, by marker and by dashes; those of a page are in `looks`."""

from __future__ import annotations

from typing import Any

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's palette: told apart by colour-blind readers too."""
_MARKERS = "os^Dv*P"

PictureLook = dict[str, Any]
"""Arguments of matplotlib's ``plot``."""


def picture_look(number: int) -> PictureLook:
    """The look of a picture's line by its number."""
    round_, place = divmod(number, len(_COLOURS))
    return {
        "color": _COLOURS[place],
        # In a second round through the colours the markers are shifted, and the lines dashed.
        "marker": _MARKERS[(place + round_) % len(_MARKERS)],
        "linestyle": "-." if round_ else "-",
    }
