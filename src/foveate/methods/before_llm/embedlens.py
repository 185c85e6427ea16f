"""EmbedLens: visual tokens that lie at a word which says nothing of the picture go before the language model.

Paper: "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in Multimodal Large Language Models", arXiv
2603.00510. A token goes if any of its nearest words (by cosine, among the input embeddings) is one of sinks, whose tokens
are the same in all pictures, or of dead ones. The code names the words of LLaVA-1.5-7B, a preset here. Reconstructed:
elsewhere `foveate calibrate embedlens` finds them, as the embedlens probe does (words met in most pictures, whose tokens are
alike from picture to picture); on vocabularies of a few hundred words the nearest one alone counts. How many tokens go
depends on the picture, so the host reads it once in a prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

from torch import Tensor

from foveate.core.artifact import Fingerprint
from foveate.core.layout import Edit, Layout
from foveate.core.method import Offline, Tokens
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import FLOAT, INDEX, Shape
from foveate.core.signal import Function, Hidden, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.select import mask_of
from foveate.ops.vocabulary import AT_ONCE, Census, Vocabulary, matching, nearest, usual_top_k

PRESETS = {Fingerprint("llava", 32, 4096, 32064): {"sinks": (1141, 26673), "dead": (30296,)}}
Drop = Literal["both", "sinks", "dead"]


@register
@dataclass(frozen=True)
class EmbedLens(Tokens, Offline):
    """Drop the tokens whose nearest words are those of sinks, of dead tokens, or of both."""

    name = "embedlens"
    title = "EmbedLens"
    group = "before_llm"
    paper = "arXiv 2603.00510"
    helps = "Where the score must not fall: only what says nothing of the picture goes, as much as there is of it."
    needs = ("projected tokens", "words of sinks and dead tokens (calibrated, or preset)")
    identity_at = {"ids": ()}  # noqa: RUF012

    drop: Drop = "both"
    """Which tokens go: sinks, dead ones, or both."""
    ids: tuple[Annotated[int, AtLeast(0)], ...] | None = None
    """The words themselves, by their ids, instead of those that ``drop`` stands for."""
    top_k: Annotated[int, AtLeast(1)] | None = None
    """How many of a token's nearest words are looked at; None = 3, or 1 where there are fewer than 10,000 words."""

    def fitted(self, traits: Traits) -> Self:
        """The words of this model."""
        return replace(self, ids=self._words(traits))

    def check(self, traits: Traits) -> str | None:
        """The words must be known, and the vocabulary must have them."""
        size = traits.fingerprint.vocabulary
        if self.ids is not None:
            beyond = [word for word in self.ids if word >= size]
            return f"ids={self.ids}: must be in 0..{size - 1}" if beyond else None
        words = self._words(traits)
        if words is None:
            lacking = f"no words are known for {traits.fingerprint}"
            return self.refuse_numbers(traits, lacking, ", or give ids=(...)")
        if not words:
            return (
                f"drop={self.drop!r}: calibration found no such words on this model, so nothing would go; use another drop"
            )
        return None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The input embeddings."""
        return (Function("embedding"),)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Which tokens."""
        return {"drop": ("both", "sinks", "dead")}

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, some words, and the cosines between them."""
        words = min(shape.vocabulary, AT_ONCE)
        embedded = words * shape.width * (shape.itemsize + 2 * FLOAT)
        cosines = shape.samples * shape.visual * words * (FLOAT + 3 * INDEX)
        return shape.edits + shape.hidden + 2 * shape.floats(shape.hidden) + embedded + cosines

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Positions stay as they were."""
        if not self.ids or not any(layout.visual):
            return None
        vocabulary = _vocabulary(seen, state.get("session", "traits"))
        rows = last_of(layout.rows(*VISUAL), max(layout.visual))
        tokens = x.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        goes = matching(nearest(tokens, vocabulary, self.top_k or usual_top_k(vocabulary.size)), self.ids)
        stays = mask_of(rows.masked_fill(goes, -1), layout.shape[1])
        counts = tuple(stays.sum(1).tolist())
        return None if counts == layout.visual else layout.keeping(stays, counts)

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Count at which words the tokens of the samples' pictures lie."""
        census = Census()
        for layout, seen in call.read(Hidden(Site("decoder", 0)), Function("embedding")):
            x = seen[Hidden(Site("decoder", 0))]
            census.add_batch(x, layout.to(x.device), _vocabulary(seen, call.traits))
        kinds = {"sinks": "sink", "dead": "dead"}
        return {name: [word.id for word in census.words if word.kind == kind] for name, kind in kinds.items()}

    def _words(self, traits: Traits) -> tuple[int, ...] | None:
        """Ids of the words whose tokens go; None where nobody knows them."""
        if self.ids is not None:
            return self.ids
        known = self.numbers(traits) or PRESETS.get(traits.fingerprint)
        kinds = ("sinks", "dead") if self.drop == "both" else (self.drop,)
        return None if known is None else tuple(word for kind in kinds for word in known[kind])


def _vocabulary(seen: Seen, traits: Traits) -> Vocabulary:
    return Vocabulary(seen[Function("embedding")], traits.fingerprint.vocabulary)
