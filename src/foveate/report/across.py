"""What a bench's scores are drawn against: the prefill's speed or, where no picture is seen, the size of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from foveate.bench.records import Record
from foveate.bench.summary import Mean
from foveate.core.recipe import NONE

Row = TypeVar("Row", Record, Mean)


@dataclass(frozen=True)
class Across:
    """A ratio to the unmodified model, 1 for that, and the words about it.

    Attributes:
        file: name of the picture.
        axis: name of the axis.
        tip: says it of a point, ``{}`` in the place of the ratio.
        caption: what it is, below the picture.
        title: over the charts of a page.
        better: what is further right.
        question: asks for the method with the largest.
        best: the answer, in the words of the question.
        beside: what stands beside a score, in a ranking.
        asked: what the tokens of a question are in.
        of_cache: whether it is how many times smaller the cache is.
    """

    file: str
    axis: str
    tip: str
    caption: str
    title: str
    better: str
    question: str
    best: str
    beside: str
    asked: str
    of_cache: bool = False

    def of(self, rows: Sequence[Row]) -> list[Row]:
        """The rows with this ratio for their speed-up, the one that is drawn and ranked; those without it are left out."""
        if not self.of_cache:
            return list(rows)
        whole = {row.key[0]: row.kv_bytes for row in rows if row.method == NONE}
        return [
            replace(row, speedup=plain / row.kv_bytes, speedup_low=None, speedup_high=None)
            for row in rows
            if row.kv_bytes and (plain := whole.get(row.key[0]))
        ]


SPEED = Across(
    file="quality_speed.png",
    axis="prefill speed-up",
    tip="speed-up {}",
    caption="speed-up of the language model's prefill",
    title="Quality and speed",
    better="faster",
    question="How fast may it be?",
    best="fastest method",
    beside="the prefill's speed-up",
    asked="picture",
)
CACHE = Across(
    file="quality_cache.png",
    axis="how many times smaller the cache is",
    tip="cache {} smaller",
    caption="cache behind the answer, beside the unmodified model's",
    title="Quality and memory",
    better="a smaller cache",
    question="How small may the cache be?",
    best="method with the smallest cache",
    beside="how many times smaller the cache is",
    asked="prompt",
    of_cache=True,
)


def across(records: Sequence[Record]) -> Across:
    """`CACHE` if the unmodified model saw no picture, as text models never do.

    What methods of the cache save of a text's prompt is memory; the prefill is as long as ever.
    """
    plain = [record for record in records if record.method == NONE]
    return CACHE if all(record.visual_tokens == 0 for record in plain or records) else SPEED
