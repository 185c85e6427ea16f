"""The charts of the probes as data, and the file ``probes.json`` that collects them for the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError
from foveate.core.files import write_json

PROBES_FILE = "probes.json"


@dataclass(frozen=True)
class Series:
    """One curve; ``low`` and ``high`` are the ends of its intervals, empty where there are none."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """As JSON, without intervals that are not there."""
        return {name: value for name, value in asdict(self).items() if value or name in ("x", "y")}


@dataclass(frozen=True)
class Chart:
    """Curves over one axis."""

    title: str
    caption: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "series": [series.to_json() for series in self.series]}


def read(folder: Path) -> dict[str, Any]:
    """What the probes have left in ``folder`` so far: ``figures`` and ``hints``."""
    path = folder / PROBES_FILE
    if not path.is_file():
        return {"figures": [], "hints": {}}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return {"figures": list(content["figures"]), "hints": dict(content["hints"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FoveateError(f"out={str(folder)!r}: {PROBES_FILE} cannot be read ({error}); remove it") from error


def publish(folder: Path, probe: str, charts: Sequence[Chart], hints: Mapping[str, Any]) -> Path:
    """Put a probe's charts and hints into ``probes.json``, in place of those of an earlier run of it."""
    there = read(folder)
    others = [figure for figure in there["figures"] if figure.get("probe") != probe]
    figures = others + [{"probe": probe, **chart.to_json()} for chart in charts]
    write_json(folder / PROBES_FILE, {"figures": figures, "hints": {**there["hints"], **hints}})
    return folder / PROBES_FILE
