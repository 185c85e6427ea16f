"""What is counted at the door. Under vLLM all of it appears in vLLM's own ``/metrics``."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client import Counter, Gauge

NO_RECIPE = "none"


class Metrics:
    """The counters of this process."""

    def __init__(self) -> None:
        # Where values of several processes are added up is chosen when it is imported.
        from prometheus_client import Counter, Gauge

        by_recipe = ["recipe"]
        self.before: Counter = Counter(
            "foveate_visual_tokens_before", "Visual tokens of the pictures that were asked about.", by_recipe
        )
        self.after: Counter = Counter("foveate_visual_tokens_after", "Of these, those that were kept.", by_recipe)
        self.refused: Counter = Counter("foveate_refused_requests", "Requests turned away at the door.", ["reason"])
        self.shadows: Counter = Counter(
            "foveate_shadow_answers", "Answers that were made a second time, with all tokens.", by_recipe
        )
        self.equal: Counter = Counter("foveate_shadow_equal_answers", "Of these, those that came out equal.", by_recipe)
        self.inside: Gauge = Gauge(
            "foveate_requests_inside", "Requests that are running or waiting.", multiprocess_mode="livesum"
        )


@cache
def metrics() -> Metrics:
    """This process's; made once."""
    return Metrics()
