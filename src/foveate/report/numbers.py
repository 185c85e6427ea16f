"""Numbers as people read them; a dash where there is none."""

from __future__ import annotations

NOTHING = "–"


def percent(value: float | None) -> str:
    """``0.8125`` as ``81.2``; the column says that it is per cent."""
    return NOTHING if value is None else f"{100 * value:.1f}"


def points(low: float, high: float) -> str:
    """An interval of shares as ``[1.2, 3.4]``, in per cent or points of it."""
    # Adding zero makes the zero positive that a small negative number is rounded to.
    return f"[{round(100 * low, 1) + 0.0:.1f}, {round(100 * high, 1) + 0.0:.1f}]"


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals."""
    return NOTHING if value is None else f"{value:.{digits}f}"


def factor(value: float | None) -> str:
    """``1.234`` as ``1.23x``."""
    return NOTHING if value is None else f"{value:.2f}x"


def between(value: float | None, low: float | None, high: float | None) -> str:
    """A ratio with its interval, ``1.23x [1.20, 1.31]``; where there is none, alone."""
    return factor(value) if low is None or high is None else f"{factor(value)} [{low:.2f}, {high:.2f}]"


def seconds(value: float | None) -> str:
    """A duration with three digits, in the unit that suits it."""
    if value is None:
        return NOTHING
    if value >= 1 or value == 0:
        return f"{_three_digits(value)} s"
    return f"{_three_digits(1e3 * value)} ms" if value >= 1e-3 else f"{_three_digits(1e6 * value)} µs"


def size(value: float | None) -> str:
    """A number of bytes with three digits, in the binary unit that suits it."""
    if value is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB"):
        if value < 1000:
            return f"{_three_digits(value)} {unit}"
        value /= 1024
    return f"{_three_digits(value)} GiB"


def _three_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
