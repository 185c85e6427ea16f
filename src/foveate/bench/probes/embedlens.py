"""EmbedLens: which visual tokens are sinks, which are dead, and which are alive.

Projected visual tokens are read through the language model's input embeddings: some lie at the same word in every picture
and hardly differ from each other (*sinks*), some at words that say nothing of the picture (*dead*), and only the rest is
about this picture (*alive*).

Paper: "What Do Visual Tokens Really Encode?", arXiv 2603.00510. Its code names the words of one checkpoint; here they are
found on any (reconstructed): words at which tokens of nearly every picture lie, with a cosine over `SINK_COSINE` between
those of different pictures, are sinks'; words of many pictures over `DEAD_COSINE` are dead ones'. Where nothing matches, the
published control removes everything else; here it removes nothing, as many as matched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from foveate.checkpoint import Checkpoint
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.roles import VISUAL
from foveate.core.signal import Function, Hidden, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.calibrate import Calibration
from foveate.ops.select import top_rows
from foveate.tasks import Question

KINDS = ("sink", "dead", "alive")
SINK_PICTURES, SINK_COSINE = 0.9, 0.99
DEAD_PICTURES, DEAD_COSINE = 0.5, 0.7
_WORDS_AT_ONCE = 16384


def nearest(tokens: Tensor, vocabulary: Tensor, top_k: int) -> Tensor:
    """``[T, top_k]`` ids of the words (``[V, D]``) with the largest cosine to each of ``tokens`` ``[T, D]``, best first."""
    tokens = normalize(tokens.float(), dim=-1)
    best, ids = tokens.new_zeros(len(tokens), 0), torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
    for first in range(0, len(vocabulary), _WORDS_AT_ONCE):
        cosine = tokens @ normalize(vocabulary[first : first + _WORDS_AT_ONCE].float(), dim=-1).T
        of_words = torch.arange(first, first + cosine.shape[1], device=ids.device).expand_as(cosine)
        best, kept = torch.cat([best, cosine], 1).sort(dim=1, descending=True, stable=True)
        best, ids = best[:, :top_k], torch.cat([ids, of_words], 1).gather(1, kept[:, :top_k])
    return ids


def matching(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    """``[...]`` bool: tokens with any of the ``wanted`` words among their nearest ``ids`` ``[..., k]``."""
    return torch.isin(ids, torch.tensor(wanted, dtype=ids.dtype, device=ids.device)).any(-1)


def as_many_others(matched: Tensor, visual: Tensor, drawn: Tensor) -> Tensor:
    """``[B, N]`` bool: of each sample, as many ``visual`` rows that are not ``matched``: those ``drawn`` highest."""
    rest = visual & ~matched
    counts = tuple(min(wanted, there) for wanted, there in zip(matched.sum(1).tolist(), rest.sum(1).tolist()))
    return top_rows(drawn, rest, counts)


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
        for word in ids.unique().tolist():
            self._met.setdefault(word, _Met()).add(directions[ids == word])

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


@dataclass(frozen=True)
class Lens:
    """The words at which a model's sinks and dead tokens lie; a token is of a kind if one of its ``top_k`` nearest is."""

    sinks: tuple[int, ...]
    dead: tuple[int, ...]
    top_k: int

    @classmethod
    def of(cls, words: Iterable[Word], top_k: int) -> Lens:
        """What a census has found."""
        words = list(words)
        sinks, dead = (tuple(word.id for word in words if word.kind == kind) for kind in ("sink", "dead"))
        return cls(sinks, dead, top_k)

    def kinds(self, ids: Tensor) -> Tensor:
        """``[...]`` place in `KINDS` of tokens with the nearest words ``ids`` ``[..., k]``; sinks go before dead ones."""
        alive = torch.full(ids.shape[:-1], KINDS.index("alive"), device=ids.device)
        dead = alive.masked_fill(matching(ids, self.dead), KINDS.index("dead"))
        return dead.masked_fill(matching(ids, self.sinks), KINDS.index("sink"))


@dataclass(frozen=True)
class Without(Tokens):
    """Before the first decoder layer, all visual tokens go that have one of the words ``ids`` among their nearest.

    Attributes:
        others: as many others go instead, drawn at random.
    """

    name = "without"
    ids: tuple[int, ...]
    top_k: int
    others: bool = False

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """At the end of the projector."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The embeddings of all words."""
        return (Function("embedding"),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Positions stay as they were."""
        vocabulary = state.get("session", "vocabulary")
        if vocabulary is None:
            vocabulary = vocabulary_of(seen, state.get("session", "traits"), x.device)
            state.put("session", "vocabulary", vocabulary)
        visual = layout.rows(*VISUAL)
        matched = visual.masked_scatter(visual, matching(nearest(x[visual], vocabulary, self.top_k), self.ids))
        if self.others:
            generator = torch.Generator().manual_seed(state.get("session", "seed"))
            drawn = torch.rand(visual.shape, generator=generator).to(x.device)
            matched = as_many_others(matched, visual, drawn)
        stays = visual & ~matched
        return layout.keeping(stays, tuple(stays.sum(1).tolist()))


def vocabulary_of(seen: Seen, traits: Traits, device: torch.device) -> Tensor:
    """``[V, D]`` the input embeddings of all words."""
    embedded: Tensor = seen[Function("embedding")](torch.arange(traits.fingerprint.vocabulary, device=device))
    return embedded


@torch.no_grad()
def count_words(checkpoint: Checkpoint, questions: Sequence[Question], batch_size: int) -> Census:
    """The census of the questions' pictures."""
    census = Census()
    for layout, x, vocabulary, _ in _projected(checkpoint, questions, batch_size):
        for sample, items in enumerate(layout.items):
            for number in range(len(items)):
                tokens = x[sample, layout.rows(*VISUAL, item=number)[sample]]
                census.add(tokens, nearest(tokens, vocabulary, 1)[:, 0])
    return census


@dataclass(frozen=True)
class Makeup:
    """What the visual tokens are: share of each of `KINDS`, and the mean cosine of each kind's tokens entering each
    decoder layer to what they were when they entered the first; None for a kind without tokens.
    """

    shares: dict[str, float]
    cosines: dict[str, list[float] | None]


@torch.no_grad()
def makeup(checkpoint: Checkpoint, questions: Sequence[Question], lens: Lens, batch_size: int) -> Makeup:
    """Sort the visual tokens of the questions' pictures and follow them through the layers."""
    layers = range(checkpoint.layers)
    counts = torch.zeros(len(KINDS), dtype=torch.double)
    sums = torch.zeros(len(KINDS), checkpoint.layers, dtype=torch.double)
    for layout, x, vocabulary, entering in _projected(checkpoint, questions, batch_size, layers):
        visual = layout.rows(*VISUAL)
        kinds = lens.kinds(nearest(x[visual], vocabulary, lens.top_k)).cpu()
        counts += torch.bincount(kinds, minlength=len(KINDS))
        for layer in layers:
            similar = cosine_similarity(
                entering[layer][visual.to(entering[layer].device)].float().to(x.device), x[visual].float()
            )
            sums[:, layer].index_add_(0, kinds, similar.double().cpu())
    shares = (counts / counts.sum()).tolist()
    cosines = [(total / count).tolist() if count else None for total, count in zip(sums, counts)]
    return Makeup(dict(zip(KINDS, shares)), dict(zip(KINDS, cosines)))


def _projected(
    checkpoint: Checkpoint, questions: Sequence[Question], batch_size: int, layers: Sequence[int] = (0,)
) -> Iterator[tuple[Layout, Tensor, Tensor, list[Tensor]]]:
    """Of each batch the layout, what enters the first decoder layer, all words, and what enters each of ``layers``."""
    wanted = [Hidden(Site("decoder", layer)) for layer in layers]
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        # One batch at a time: the pictures of all of them together may be large.
        inputs = checkpoint.inputs([each.images for each in batch], [each.turns[0].prompt for each in batch])
        calibration = Calibration(checkpoint.model, [inputs])
        ((layout, seen),) = calibration.read(*wanted, Function("embedding"))
        x = seen[wanted[0]]
        layout = layout.to(x.device)
        yield layout, x, vocabulary_of(seen, calibration.traits, x.device), [seen[signal] for signal in wanted]
