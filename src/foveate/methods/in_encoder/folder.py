"""FOLDER: behind the last encoder block that is used, similar tokens are merged, fold after fold, down to the budget.

Paper: "FOLDER: Accelerating Multi-modal Large Language Models with Enhanced Performance", arXiv 2501.02430. The published
code has two versions, both here: ``form="encoder"`` (complete, for LLaVA: between attention and MLP, by keys, sparing what
CLS attends to) and ``form="features"`` (simplified folder.py: by the features themselves, here behind the projector, which
needs neither). ``"auto"`` takes the first where the model allows it. Differs: the simplified version's factor 1 + ln size is
off unless ``scale`` asks for it; folds below 40 tokens, on which the LLaVA version raises, are made. Reconstructed: a last
fold of two tokens without CLS into one, where the published count of (n - 1) // 2 would never end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Keep
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import QueryKey, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.matching import Order, averaging, bipartite, matching_bytes

MergeAttention = Literal["mean", "sum"]


def fold_plan(rows: int, remove: int) -> list[int]:
    """Rows to remove in each fold, CLS counted among ``rows``: (n - 1) // 2 of the n that are left, at most."""
    folds = []
    while remove > 0:
        folds.append(min(max((rows - 1) // 2, 1), remove))
        rows, remove = rows - folds[-1], remove - folds[-1]
    return folds


def folded(
    metric: Tensor,
    size: Tensor,
    remove: Sequence[int],
    live: Sequence[int],
    *,
    valid: Tensor | None = None,
    protected: int = 0,
    attention: Tensor | None = None,
    strength: float = 500.0,
    merge_attention: MergeAttention = "mean",
    order: Order = "grouped",
) -> tuple[Tensor, Tensor]:
    """Fold ``remove[b]`` of ``live[b]`` rows away; after each fold, what is compared is merged like the tokens.

    Args:
        metric: ``[B, n, d]`` what similarity is measured on.
        size: ``[B, n]`` originals that each row stands for.
        remove: rows to remove of each sample; at least one that is not protected is left.
        live: rows that are not padding.
        valid: ``[B, n]`` which rows these are; None = the first ones.
        protected: CLS rows.
        attention: ``[B, n]`` attention of CLS; None = by similarity alone.
        strength: factor (alpha * c) of the attention that is subtracted from a row's similarities.
        merge_attention: how that of merged rows is merged.
        order: see `bipartite`; the next fold's parity counts in it.

    Returns:
        ``[B, n]`` output row of each row and ``[B, k]`` anchors, as `bipartite`'s.
    """
    anchor = torch.arange(metric.shape[1], device=metric.device).expand(size.shape)
    assignment = anchor
    for r in zip_longest(*map(fold_plan, live, remove), fillvalue=0):
        penalty = None if attention is None else strength * attention
        step, kept = bipartite(metric, r, live, valid=valid, protected=protected, penalty=penalty, order=order)
        assignment = step.gather(1, assignment.clamp(min=0)).masked_fill(assignment < 0, -1)
        anchor = anchor.gather(1, kept.clamp(min=0)).masked_fill(kept < 0, -1)
        mean = averaging(step, kept, size)
        metric, size = mean.apply(metric), mean.mass(size)
        if attention is not None:
            ones = torch.ones_like(attention)
            merge = averaging(step, kept, ones) if merge_attention == "mean" else Reduction.merging(step, ones, kept)
            attention = merge.apply(attention)
        live, valid = tuple(n - gone for n, gone in zip(live, r)), kept >= 0
    return assignment, anchor


def scaled(reduction: Reduction, size: Tensor, remove: Sequence[int], live: Sequence[int]) -> Reduction:
    """The same with tokens multiplied by 1 + ln of their size, where the published code does so.

    That is after several folds, and after a single one of fewer rows than half of those that are left.
    """
    grows = [r > 0 and (0 if len(fold_plan(n, r)) > 1 else r) < (n - r) // 2 for n, r in zip(live, remove)]
    factor = 1 + reduction.mass(size).clamp(min=1).log() * upload(grows, size.device)[:, None]
    assert reduction.entries is not None
    target, source, weight = reduction.entries
    by_target = torch.cat([factor.flatten(), factor.new_ones(1)])  # rows that are dropped go nowhere
    return Reduction(reduction.inputs, reduction.anchor, (target, source, weight * by_target[target]))


@register
@dataclass(frozen=True)
class Folder(Tokens):
    """Merge similar tokens at the end of the encoder, or behind the projector."""

    name = "folder"
    title = "FOLDER"
    group = "in_encoder"
    paper = "arXiv 2501.02430"
    helps = "Any question: no question is read, and what is alike is merged, not lost. Encoders without CLS take it, too."
    needs = ("encoder keys and CLS attention (1 block), or nothing (form='features')",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 192
    """Tokens that are left of each grid (a picture, or one tile or view of it)."""
    form: Literal["auto", "encoder", "features"] = "auto"
    """Between attention and MLP of the last block (``"encoder"``), behind the projector (``"features"``), or the first
    where the model allows it (``"auto"``).
    """
    alpha: Annotated[float, AtLeast(0)] = 5.0
    """How much attention of CLS protects a token from moving, in units of ``constant``; encoder form only."""
    constant: Annotated[float, AtLeast(0)] = 100.0
    """Scale of CLS attention beside similarity: 100 in the LLaVA version, 30 in folder.py; encoder form only."""
    merge_attention: MergeAttention = "mean"
    """What attention of CLS a merged token has: the ``"mean"`` of its members' (LLaVA version) or the ``"sum"``
    (folder.py).
    """
    order: Literal["auto", "grouped", "raster"] = "auto"
    """In which the tokens stand: ``"grouped"`` as published in the encoder, ``"raster"`` as published of features,
    ``"auto"`` as either does.
    """
    scale: bool = False
    """Whether tokens are multiplied by 1 + ln size, under folder.py's condition; with ``form="features"``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(not self.scale or self.form == "features", "scale", "goes with form='features'")

    def budget(self) -> Budget:
        """Tokens to keep of each image."""
        return Budget(self.keep)

    def check(self, traits: Traits) -> str | None:
        """The encoder form needs CLS and the middle of a block, the other one rows behind the projector."""
        if self.form != "encoder":
            return None if self._in_encoder(traits) else traits.refuse_sites("projected")
        remedy = "use form='features'"
        if traits.encoder_layers is None or not traits.has_cls:
            return f"form='encoder': needs the attention of a CLS token, which {traits.family} does not offer; {remedy}"
        refused = traits.refuse_sites("middle")
        return f"form='encoder': {refused}; {remedy}" if refused else None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The middle of the block that feeds the projector, or behind the projector."""
        if self._in_encoder(traits):
            return (Site("encoder", traits.feature_layer or 0, "middle"),)
        return (Site("projected"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Keys and CLS attention of that block."""
        site = Site("encoder", traits.feature_layer or 0)
        return (QueryKey(site), Rows(site, "cls")) if self._in_encoder(traits) else ()

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Scaling goes with one form only."""
        return {"scale": (self.scale,)}

    def workspace(self, shape: Shape) -> int:
        """As `ToMe`'s, of the encoder's rows or of the projected tokens."""
        return shape.edits + matching_bytes(shape) + shape.pairs + 6 * shape.floats(shape.hidden)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Fold down to the budget of each image."""
        kept = [min(self.budget().of(items[0].count), n) for items, n in zip(layout.items, layout.visual)]
        remove = tuple(n - k for n, k in zip(layout.visual, kept))
        if not any(remove):
            return None
        metric, attention = x, None
        order: Order = "raster"
        if site.kind == "encoder":
            read = Site("encoder", site.layer)
            metric, order = seen[QueryKey(read)][1].float().mean(1), "grouped"
            attention = seen[Rows(read, "cls")].probabilities()[:, :, 0].mean(1)
            # CLS may be left out of the keys: it never moves, so its attention to itself is not looked at.
            attention = torch.nn.functional.pad(attention, (metric.shape[1] - attention.shape[1], 0))
        reduction = averaging(
            *folded(
                metric.float(),
                layout.size,
                remove,
                layout.live,
                valid=layout.valid,
                protected=layout.live[0] - layout.visual[0],
                attention=attention,
                strength=self.alpha * self.constant,
                merge_attention=self.merge_attention,
                order=order if self.order == "auto" else self.order,
            ),
            layout.size,
        )
        if self.scale:
            reduction = scaled(reduction, layout.size, remove, layout.live)
        live = tuple(n - r for n, r in zip(layout.live, remove))
        return Edit(reduction, positions="auto", live=live, visual=tuple(kept))

    def _in_encoder(self, traits: Traits) -> bool:
        fits = traits.encoder_layers is not None and traits.has_cls and traits.refuse_sites("middle") is None
        return self.form == "encoder" or (self.form == "auto" and fits)
