"""Wall-clock seconds by name; on a GPU by events of its own, so that measuring waits for nothing."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def reader(device: torch.device) -> Callable[[], Any]:
    """What says when it is on a device, for every `Clock` of that device."""
    if device.type != "cuda":
        return time.perf_counter

    def now() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))  # the current device may be another
        return event

    return now


class Clock:
    """Adds up laps under names."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._laps: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self.now = reader(device)
        """Says when it is; for `add`."""

    def add(self, name: str, begun: Any) -> None:
        """A lap under ``name``, from ``begun`` to now."""
        self._laps[name].append((begun, self.now()))

    @contextmanager
    def lap(self, name: str) -> Iterator[None]:
        """Time a block."""
        begun = self.now()
        yield
        self.add(name, begun)

    def count(self, name: str) -> int:
        """Laps under a name."""
        return len(self._laps.get(name, ()))

    @property
    def over(self) -> bool:
        """Whether the work of all laps has been done, so that nobody waits for it."""
        return not self._cuda or all(ended.query() for laps in self._laps.values() for _, ended in laps)

    def seconds(self, name: str) -> float:
        """Their sum (on a GPU this waits for the work to finish)."""
        laps = self._laps.get(name, ())
        if self._cuda and laps:
            for _, ended in laps:
                ended.synchronize()
            return sum(begun.elapsed_time(ended) for begun, ended in laps) / 1e3
        return sum(ended - begun for begun, ended in laps)
