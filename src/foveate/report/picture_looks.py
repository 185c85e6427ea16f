"""How lines look in pictures, told apart by colour and by marker; those of a page are in `looks`."""

from __future__ import annotations

from typing import Any

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#7b2d8b")
"""Okabe and Ito's palette and a violet: told apart by colour-blind readers too."""
_MARKERS = "os^Dv*PX"

MOST_LOOKS = len(_COLOURS)
"""Lines that look different from each other; more in one panel nobody reads."""

PictureLook = dict[str, Any]
"""Arguments of matplotlib's ``plot``."""


def picture_look(number: int) -> PictureLook:
    """The look of a panel's line by its number, which is below `MOST_LOOKS`."""
    return {"color": _COLOURS[number], "marker": _MARKERS[number]}
