"""Wall-clock seconds by name; on a GPU by events of its own, so that measuring waits for nothing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


class Clock:
    """Adds up laps under names."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._cuda = device.type == "cuda"
        self._laps: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._open: dict[str, Any] = {}

    def start(self, name: str) -> None:
        """Begin a lap (a lap left open by an exception is forgotten)."""
        self._open[name] = self._now()

    def stop(self, name: str) -> None:
        """End the lap begun last under this name, if any."""
        begun = self._open.pop(name, None)
        if begun is not None:
            self._laps[name].append((begun, self._now()))

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time a block."""
        begun = self._now()
        yield
        self._laps[name].append((begun, self._now()))

    def reset(self, *names: str) -> None:
        """Forget the laps under ``names``."""
        for name in names:
            self._laps.pop(name, None)

    def count(self, name: str) -> int:
        """Laps under a name."""
        return len(self._laps.get(name, ()))

    def seconds(self, name: str) -> float:
        """Their sum (on a GPU this waits for the work to finish)."""
        laps = self._laps.get(name, ())
        if self._cuda and laps:
            torch.cuda.synchronize(self._device)
            return sum(begun.elapsed_time(ended) for begun, ended in laps) / 1e3
        return sum(ended - begun for begun, ended in laps)

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))  # the current device may be another
        return event
