"""What ``/metrics`` of the server shows of us, by recipe.

Of vLLM's several processes, those that count write into the folder ``PROMETHEUS_MULTIPROC_DIR``; without it only what the
server's own process counts is shown. The dummy pictures by which vLLM measures its memory are not counted.
"""

from __future__ import annotations

from collections import deque
from functools import cache
from typing import Any

from foveate.engine.clock import Clock

LAPS = ("encoder signals", "method")
"""What counts of a `foveate.engine.clock.Clock`."""


@cache
def _meters() -> tuple[Any, Any, Any, Any]:
    from prometheus_client import Counter, Histogram

    steps = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
    return (
        Counter("foveate_visual_tokens_before", "Visual tokens of pictures that came in.", ["recipe"]),
        Counter("foveate_visual_tokens_after", "Visual tokens that were left of them.", ["recipe"]),
        Counter("foveate_method_failures", "Pictures of which an even grid was kept, as the method failed.", ["recipe"]),
        Histogram("foveate_scoring_seconds", "Seconds to score and choose, by batch.", ["recipe"], buckets=steps),
    )


def count(recipe: str, before: int, after: int) -> None:
    """A picture came in."""
    came, left, _, _ = _meters()
    came.labels(recipe).inc(before)
    left.labels(recipe).inc(after)


def failed(recipe: str, pictures: int) -> None:
    """A method failed on so many pictures."""
    _meters()[2].labels(recipe).inc(pictures)


class Scoring:
    """How long it takes to score and choose; on a GPU it is read once the work is through, so that nothing waits."""

    def __init__(self, recipe: str) -> None:
        self._recipe = recipe
        self._open: deque[Clock] = deque()

    def add(self, clock: Clock) -> None:
        """A batch of pictures was, or will have been, scored under ``clock``."""
        self._open.append(clock)
        while self._open and self._open[0].over:
            done = self._open.popleft()
            _meters()[3].labels(self._recipe).observe(sum(map(done.seconds, LAPS)))
