"""What the probes tell the tuner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from foveate.bench.probes.charts import read


@dataclass(frozen=True)
class Hints:
    """What is known of a model; None where no probe has looked, or found no such layer.

    Attributes:
        horizon: first decoder layer from which on all visual tokens can go at less than 1 % of the score, mean over tasks
            (whichever tolerance the probe was asked for).
        horizon_by_task: the same of each task.
        information_horizon: first layer from which no window of the picture moves the probability of the right answer by
            more than the tolerance.
        sink_share, dead_share: of the visual tokens, those that are sinks and those that are dead.
    """

    horizon: int | None = None
    horizon_by_task: Mapping[str, int | None] = field(default_factory=dict)
    information_horizon: int | None = None
    sink_share: float | None = None
    dead_share: float | None = None

    @classmethod
    def load(cls, folder: Path) -> Self:
        """The hints of a folder in which probes ran; empty where none did."""
        return cls.from_json(read(folder)["hints"])

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Self:
        """From what `to_json` gave; what another version wrote besides is left out."""
        known = {each.name for each in fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)
