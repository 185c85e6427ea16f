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
        self.refused: Counter = Counter("foveate_refused_requests", "Requests turned away at the door.", ["reason"])
        self.shadows: Counter = Counter(
            "foveate_shadow_answers", "Answers that were made a second time, with all tokens.", by_recipe
        )
        self.equal: Counter = Counter("foveate_shadow_equal_answers", "Of these, those that came out equal.", by_recipe)
        self.inside: Gauge = Gauge(
            "foveate_requests_inside", "Requests that are running or waiting.", multiprocess_mode="livesum"
        )


class Tokens:
    """Counters of visual tokens, under the names that the plug-in gives them under vLLM."""

    def __init__(self) -> None:
        from prometheus_client import Counter

        self.before: Counter = Counter("foveate_visual_tokens_before", "Visual tokens of pictures that came in.", ["recipe"])
        self.after: Counter = Counter("foveate_visual_tokens_after", "Visual tokens that were left of them.", ["recipe"])

    def count(self, recipe: str, before: int, after: int) -> None:
        """A request's pictures came in."""
        self.before.labels(recipe).inc(before)
        self.after.labels(recipe).inc(after)


@cache
def metrics() -> Metrics:
    """This process's; made once."""
    return Metrics()


@cache
def tokens() -> Tokens:
    """This process's; not under vLLM, where the plug-in has its own of these names."""
    return Tokens()
