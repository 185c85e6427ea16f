"""Questions apart by difficulty: what a smaller picture still answers says little about a method.

VTC-Bench (arXiv 2510.07143): a question is *simple* if the downsampled run answers it, and *difficult* if the full model
does and the downsampled one does not. On the difficult ones a method has to prove itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from foveate.bench.cells import SMALLER, Keep, keep_text
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.statistics import interval
from foveate.core.recipe import NONE

LEAST = 30
"""Questions of a group; of fewer nothing is reported."""
RIGHT = 0.5
"""A score from which on a question counts as answered, where metrics give parts of a point."""


@dataclass(frozen=True)
class Group:
    """What a method scores on questions of one difficulty: how many, their mean score, and its 95 % interval."""

    n: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Difficulty:
    """A method at a budget, over all tasks, on the questions that ``by`` still answers and on those that it does not.

    A group of fewer than `LEAST` questions is None.
    """

    method: str
    keep: Keep
    by: str
    simple: Group | None
    difficult: Group | None


def difficulties(folder: Results, records: Sequence[Record]) -> list[Difficulty]:
    """One for each method and budget that a smaller picture was measured at, too; `downsample`, or `pool` in its place.

    Methods without a budget compare with no size of picture, and so are left out, as is the smaller picture itself.
    """
    return [found for keep in _budgets(records) for found in _at(folder, records, keep)]


def _budgets(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(keep_text(record.keep) for record in records if record.keep is not None))


def _at(folder: Results, records: Sequence[Record], keep: str) -> Iterator[Difficulty]:
    here = [record for record in records if keep_text(record.keep) == keep]
    by = next((name for name in SMALLER if any(record.method == name for record in here)), None)
    if by is None:
        return
    groups: dict[str, tuple[Keep, list[float], list[float]]] = {}
    for task in dict.fromkeys(record.task for record in here):
        plain, smaller = folder.record((task, NONE, "")), folder.record((task, by, keep))
        if plain is None or smaller is None:
            continue
        split = list(zip(folder.scores(plain), folder.scores(smaller), strict=True))
        for record in (record for record in here if record.task == task and record.method not in SMALLER):
            _, simple, difficult = groups.setdefault(record.method, (record.keep, [], []))
            for score, (full, small) in zip(folder.scores(record), split, strict=True):
                if small >= RIGHT:
                    simple.append(score)
                elif full >= RIGHT:
                    difficult.append(score)
    for method, (budget, simple, difficult) in groups.items():
        yield Difficulty(method, budget, by, _group(simple), _group(difficult))


def _group(scores: Sequence[float]) -> Group | None:
    return Group(len(scores), fmean(scores), *interval(scores)) if len(scores) >= LEAST else None
