"""EmbedLens: which visual tokens are sinks, which are dead, and which are alive.

Projected visual tokens are read through the language model's input embeddings: some lie at the same word in every picture
and hardly differ from each other (*sinks*), some at words that say nothing of the picture (*dead*), and only the rest is
about this picture (*alive*).

Paper: "What Do Visual Tokens Really Encode?", arXiv 2603.00510. Its code names the words of one checkpoint; here they are
found on any (reconstructed, see `foveate.ops.vocabulary.Word`). Where nothing matches, the published control removes
everything else; here it removes nothing, as many as matched. The method that drops them is ``embedlens``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from foveate.checkpoint import Checkpoint
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.roles import VISUAL
from foveate.core.signal import Function, Hidden, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.calibrate import Calibration
from foveate.ops.select import top_rows
from foveate.ops.vocabulary import Census, Vocabulary, Word, matching, nearest
from foveate.tasks import Question

KINDS = ("sink", "dead", "alive")


def as_many_others(matched: Tensor, visual: Tensor, drawn: Tensor) -> Tensor:
    """``[B, N]`` bool: of each sample, as many ``visual`` rows that are not ``matched``: those ``drawn`` highest."""
    rest = visual & ~matched
    counts = tuple(min(wanted, there) for wanted, there in zip(matched.sum(1).tolist(), rest.sum(1).tolist()))
    return top_rows(drawn, rest, counts)


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
        vocabulary = vocabulary_of(seen, state.get("session", "traits"))
        visual = layout.rows(*VISUAL)
        matched = visual.masked_scatter(visual, matching(nearest(x[visual], vocabulary, self.top_k), self.ids))
        if self.others:
            generator = torch.Generator().manual_seed(state.get("session", "seed"))
            drawn = torch.rand(visual.shape, generator=generator).to(x.device)
            matched = as_many_others(matched, visual, drawn)
        stays = visual & ~matched
        return layout.keeping(stays, tuple(stays.sum(1).tolist()))


def vocabulary_of(seen: Seen, traits: Traits) -> Vocabulary:
    """The input embeddings of all words."""
    return Vocabulary(seen[Function("embedding")], traits.fingerprint.vocabulary)


@torch.no_grad()
def count_words(checkpoint: Checkpoint, questions: Sequence[Question], batch_size: int) -> Census:
    """The census of the questions' pictures."""
    census = Census()
    for layout, x, vocabulary, _ in _projected(checkpoint, questions, batch_size):
        census.add_batch(x, layout, vocabulary)
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
) -> Iterator[tuple[Layout, Tensor, Vocabulary, list[Tensor]]]:
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
        yield layout, x, vocabulary_of(seen, calibration.traits), [seen[signal] for signal in wanted]
