"""Visual tokens read through the words that they are nearest to: what lies where, and how alike in different pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.roles import VISUAL
from foveate.ops.select import top_k as best_of

SINK_PICTURES, SINK_COSINE = 0.9, 0.99
"""A sink's word is met in such a share of the pictures at least, its tokens more alike than so."""
DEAD_PICTURES, DEAD_COSINE = 0.5, 0.7
"""The same of dead tokens' words."""
AT_ONCE = 4096
"""Words whose embeddings are held at a time."""


class Vocabulary(NamedTuple):
    """A model's input embeddings: ``embed(ids [n])`` to ``[n, D]``, of ``size`` words."""

    embed: Callable[[Tensor], Tensor]
    size: int


def nearest(tokens: Tensor, vocabulary: Vocabulary, top_k: int) -> Tensor:
    """``[..., top_k]`` ids of the words with the largest cosine to each of ``tokens`` ``[..., D]``, best first."""
    tokens = normalize(tokens.float(), dim=-1)
    best, ids = tokens.new_zeros(*tokens.shape[:-1], 0), torch.zeros(*tokens.shape[:-1], 0, dtype=torch.long)
    ids = ids.to(tokens.device)
    for first in range(0, vocabulary.size, AT_ONCE):
        words = torch.arange(first, min(first + AT_ONCE, vocabulary.size), device=tokens.device)
        cosine = tokens @ normalize(vocabulary.embed(words).float(), dim=-1).T
        found = best_of(cosine, top_k)
        ids, best = torch.cat([ids, found + first], -1), torch.cat([best, cosine.gather(-1, found)], -1)
        kept = best_of(best, top_k)  # earlier words stand in front: of equals they stay
        ids, best = ids.gather(-1, kept), best.gather(-1, kept)
    return ids


def matching(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """``[...]`` bool: tokens with any of the ``wanted`` words among their nearest ``ids`` ``[..., k]``."""
    return torch.isin(ids, upload(wanted, ids.device, ids.dtype)).any(-1)


def usual_top_k(words: int) -> int:
    """The paper's 3 of tens of thousands of words; of a hundred, the second and third nearest mean nothing."""
    return 3 if words >= 10_000 else 1


@dataclass(frozen=True)
class Word:
    """A word as the visual tokens meet it.

    Attributes:
        id: of the word.
        share: tokens that it is nearest to, among all.
        pictures: share of the pictures with such a token.
        cosine: mean cosine between such tokens of different pictures, 0 where only one has any.
    """

    id: int
    share: float
    pictures: float
    cosine: float

    @property
    def kind(self) -> str:
        """Which kind of tokens lies there."""
        if self.pictures >= SINK_PICTURES and self.cosine > SINK_COSINE:
            return "sink"
        return "dead" if self.pictures >= DEAD_PICTURES and self.cosine > DEAD_COSINE else "alive"


@dataclass
class Census:
    """Counts the words at which visual tokens lie, picture by picture."""

    pictures: int = 0
    tokens: int = 0
    _met: dict[int, _Met] = field(default_factory=dict)

    def add(self, tokens: Tensor, ids: Tensor) -> None:
        """Count a picture: its tokens ``[T, D]`` and the nearest word of each ``[T]``."""
        self.pictures += 1
        self.tokens += len(ids)
        directions = normalize(tokens.float(), dim=-1)
        for word in sorted(set(ids.tolist())):
            self._met.setdefault(word, _Met()).add(directions[ids == word])

    def add_batch(self, x: Tensor, layout: Layout, vocabulary: Vocabulary) -> None:
        """Count the pictures of a batch of prompts, whose rows are ``x`` ``[B, N, D]``."""
        for sample, items in enumerate(layout.items):
            for number in range(len(items)):
                tokens = x[sample, layout.rows(*VISUAL, item=number)[sample]]
                self.add(tokens, nearest(tokens, vocabulary, 1)[:, 0])

    @property
    def words(self) -> list[Word]:
        """Every word that was met, the most frequent first."""
        found = [
            Word(word, met.tokens / self.tokens, met.pictures / self.pictures, met.cosine) for word, met in self._met.items()
        ]
        return sorted(found, key=lambda word: (-word.share, word.id))


@dataclass
class _Met:
    """Sums from which the mean cosine between tokens of different pictures follows, without keeping any of them."""

    pictures: int = 0
    tokens: int = 0
    total: Tensor | float = 0.0
    within: float = 0.0
    pairs_within: int = 0

    def add(self, directions: Tensor) -> None:
        """Of one picture, ``[n, D]``, normalised."""
        total = directions.sum(0).double()
        self.total = self.total + total
        self.within += float(total.square().sum())
        self.pictures += 1
        self.tokens += len(directions)
        self.pairs_within += len(directions) ** 2

    @property
    def cosine(self) -> float:
        """Mean over all pairs, less those within one picture."""
        pairs = self.tokens**2 - self.pairs_within
        return (float(torch.as_tensor(self.total).square().sum()) - self.within) / pairs if pairs else 0.0
