"""ToMe: in every block of the encoder, between attention and MLP, tokens are merged into the most similar other ones.

Paper: "Token Merging: Your ViT But Faster", arXiv 2210.09461. Like the published code, except that sorts are stable.
Reconstructed: the budget ``keep`` of tokens that are to remain of each image, in equal steps over the blocks that feed the
projector; where these would more than halve the tokens of late blocks, the rest moves to earlier ones. Give ``r`` for the
published schedules. ``proportional=False, weighted=False`` is the port to LLaVA of LightCompress, which forgets sizes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import QueryKey, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.matching import Order, averaging, bipartite, matching_bytes


def parse_r(blocks: int, r: int | tuple[int, float] | Sequence[int]) -> list[int]:
    """Tokens to merge in each block: a constant, (mean, inflection in [-1, 1]), or a list, filled up with zeros."""
    if isinstance(r, int):
        r = (r, 0.0)
    if not isinstance(r, tuple):
        return [*r, *[0] * blocks][:blocks]
    mean, inflect = r
    least = int(mean * (1.0 - inflect))
    step = (2 * mean - 2 * least) / max(blocks - 1, 1)
    return [int(least + step * block) for block in range(blocks)]


def equal_steps(tokens: int, keep: int, blocks: int) -> list[int] | None:
    """Tokens to merge in each block so that ``keep`` of ``tokens`` remain: equal steps, none of more than half.

    None where so many blocks cannot do it.
    """
    steps: list[int] = []
    after = keep  # walk back from the last block: what it leaves is the most that it can have merged
    for block in range(blocks, 0, -1):
        steps.insert(0, min((tokens - after) // block, after))
        after += steps[0]
    return steps if after == tokens else None


def match_tokens(keys: Tensor, r: Sequence[int], layout: Layout) -> tuple[Tensor, Tensor]:
    """`bipartite` matching of the rows at an encoder site by their keys ``[I, H, n, d]``, CLS rows protected.

    Surviving even rows stay in order behind a CLS row, and in the order of their similarity where there is none.
    """
    protected = layout.live[0] - layout.visual[0]
    order: Order = "grouped" if protected else "similarity"
    return bipartite(keys.float().mean(1), r, layout.live, valid=layout.valid, protected=protected, order=order)


@register
@dataclass(frozen=True)
class ToMe(Tokens):
    """Merge similar tokens in every encoder block up to the one that feeds the projector."""

    name = "tome"
    title = "ToMe"
    group = "in_encoder"
    paper = "arXiv 2210.09461"
    helps = "Where the encoder's own time matters: its later blocks already run on fewer tokens."
    needs = ("encoder keys (all blocks)", "access between attention and MLP")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 192
    """Tokens that are left of each grid (a picture, or one tile or view of it); not read where ``r`` is given."""
    r: Annotated[int, AtLeast(0)] | tuple[Annotated[int, AtLeast(0)], ...] | None = None
    """Tokens to merge in each block, instead of ``keep``: the same number, or one for each block."""
    inflect: Annotated[float, In(-1, 1)] = 0.0
    """With a single ``r``: -1 merges most in the first block and nothing in the last, 1 the other way round."""
    proportional: bool = True
    """Whether attention counts a merged token as often as it has originals (log size as a bias of its key)."""
    weighted: bool = True
    """Whether means are weighted by size, so that each original counts once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.inflect == 0 or isinstance(self.r, int), "inflect", "goes with a single number r")

    def budget(self) -> Budget:
        """Tokens to keep of each image."""
        return Budget(self.keep)

    def check(self, traits: Traits) -> str | None:
        """Needs the middle of the encoder's blocks, and enough of them for the budget."""
        if traits.encoder_layers is None or traits.feature_layer is None:
            return f"needs encoder keys, which are not available on {traits.family}; use folder(form='features')"
        refused = traits.refuse_sites("middle")
        if refused:
            return f"{refused}; use folder(form='features')"
        blocks = traits.feature_layer + 1
        if self.r is not None:
            return None
        if traits.patches is not None:
            return self._unreachable(traits.patches, blocks)
        least = 0.5**blocks
        if isinstance(self.keep, float) and self.keep < least:
            return f"keep={self.keep}: {blocks} blocks, each of which at most halves, cannot go below {least:g}; raise keep"
        return None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Between attention and MLP of each block."""
        return tuple(Site("encoder", block, "middle") for block in range((traits.feature_layer or 0) + 1))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The keys of each block."""
        return tuple(QueryKey(Site("encoder", site.layer)) for site in self.sites(traits))

    def workspace(self, shape: Shape) -> int:
        """Similarities of even and odd tokens, keys of two blocks, and the merge of the wide rows."""
        return shape.edits + matching_bytes(shape)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Match by the block's keys, average by size."""
        r = self._counts(site.layer, layout, state.get("session", "traits"))
        if not any(r):
            return None
        _, keys = seen[QueryKey(Site("encoder", site.layer))]
        assignment, anchor = match_tokens(keys, r, layout)
        reduction = averaging(assignment, anchor, layout.size if self.weighted else torch.ones_like(layout.size))
        bias = reduction.mass(layout.size).masked_fill(~reduction.valid, 1).log() if self.proportional else None
        live, visual = (tuple(n - gone for n, gone in zip(counts, r)) for counts in (layout.live, layout.visual))
        return Edit(reduction, positions="auto", key_bias=bias, live=live, visual=visual)

    def _counts(self, block: int, layout: Layout, traits: Traits) -> tuple[int, ...]:
        """Tokens to merge of each image in this block."""
        if self.r is not None:
            r = (self.r, self.inflect) if isinstance(self.r, int) else list(self.r)
            schedule = parse_r(traits.encoder_layers or 0, r)
            return tuple(min(schedule[block], count // 2) for count in layout.visual)
        left = (traits.feature_layer or 0) + 1 - block
        counts = []
        for count, (item, *_) in zip(layout.visual, layout.items):
            steps = equal_steps(count, min(self.budget().of(item.count), count), left)
            if steps is None:
                raise FoveateError(f"tome: {self._unreachable(item.count, left)}")
            counts.append(steps[0])
        return tuple(counts)

    def _unreachable(self, tokens: int, blocks: int) -> str | None:
        """Why ``blocks`` blocks cannot bring an image of ``tokens`` tokens down to the budget."""
        if equal_steps(tokens, self.budget().of(tokens), blocks) is not None:
            return None
        least = -(-tokens // 2**blocks)
        return (
            f"keep={self.keep}: {blocks} blocks, each of which at most halves, leave {least} or more of an image's {tokens} "
            f"tokens; use keep={least}"
        )
