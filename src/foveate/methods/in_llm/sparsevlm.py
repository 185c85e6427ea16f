"""SparseVLM: the words that match the picture rate its tokens layer by layer; part of what is dropped is recycled.

Paper: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", arXiv 2410.04417. Budgets are
those of the current release (fixed for each layer) or, with ``rank``, those of the first one: as many tokens as the rank of
what the raters attend to says, times and plus numbers that the paper does not give. As the code, raters lie strictly above
the mean (all, where none does), and clusters are means (the paper sums), joined by Euclidean distance. ``plus=True`` is
SparseVLM+: attention is divided by what the rotation alone makes of it, the heads that look at the picture most count,
nothing is recycled, positions stay. Differs from the code: a budget of all that is there changes nothing, and of equally
dense tokens the first is the denser (the code draws noise). Reconstructed: other depths and grids get the same shares of the
depth and of the tokens, and all pictures of a prompt are one, behind whose last row the clusters stand.

The rank has to come to the host once for each of the layers, because the sequence's length depends on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, CountOrShare, In, Layers
from foveate.core.positions import Positions
from foveate.core.ranking import ranked
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Function, KeyValue, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import row_logits
from foveate.ops.cluster import density_peaks
from foveate.ops.select import first_rows, top_k, top_rows

TOKENS = 576
KEPT = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
KEPT_PLUS = {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)}
"""Tokens kept at each layer, out of ``TOKENS``, by the mean count over the layers of LLaVA-1.5-7B."""
RATERS = "sparsevlm"
"""Key of which rows rate."""


def rating(visual: Tensor, there: Tensor, text: Tensor, asking: Tensor) -> tuple[Tensor, Tensor]:
    """How much each text token is what the picture speaks of, and which ones are to rate.

    Args:
        visual: ``[B, V, D]`` embeddings, ``there`` ``[B, V]`` which are no padding.
        text: ``[B, Q, D]`` embeddings, ``asking`` ``[B, Q]`` which are no padding.

    Returns:
        ``[B, Q]`` relevance, summing to 1, and ``[B, Q]`` the raters: those above the mean, or all if none is.
    """
    logits = (visual.float() @ text.float().mT).masked_fill(~asking[:, None], torch.finfo(torch.float32).min)
    relevance = (logits.softmax(-1) * there[..., None]).sum(1) / there.sum(1, keepdim=True).clamp(min=1)
    above = asking & (relevance > relevance.sum(1, keepdim=True) / asking.sum(1, keepdim=True).clamp(min=1))
    return relevance, torch.where(above.any(1, keepdim=True), above, asking)


def rotation_alone(ones: Tensor, rows: Tensor) -> Tensor:
    """Logits ``[B, Q, N]`` of ``rows`` ``[B, Q]`` where queries and keys are all ones ``[B, 1, N, d]``, once rotated."""
    query = ones.gather(2, rows[:, None, :, None].expand(-1, 1, -1, ones.shape[3]))
    return row_logits(query, ones, ones.shape[3] ** -0.5)[:, 0]


def rated(attention: Tensor, raters: Tensor, visual: Tensor, heads: int | None = None) -> Tensor:
    """Attention of each rater, the mean over heads: ``[B, Q, N]``, 0 for other queries and keys.

    Args:
        attention: ``[B, H, Q, N]``.
        raters: ``[B, Q]`` bool.
        visual: ``[B, N]`` bool: the keys that count.
        heads: how many count, those that attend most; None = all.
    """
    seen = torch.where(raters[:, None, :, None] & visual[:, None, None], attention, 0)
    if heads is None or heads >= seen.shape[1]:
        return seen.mean(1)
    best = top_k(seen.sum((2, 3)), heads)
    return seen.gather(1, best[..., None, None].expand(-1, -1, *seen.shape[2:])).mean(1)


def ranks(rows: Tensor, raters: Tensor, visual: Sequence[int]) -> list[int]:
    """Numerical rank of each sample's ``rows`` ``[B, Q, N]``, those of its ``raters`` ``[B, Q]`` over ``visual`` keys."""
    # Rows and columns of zeros change no rank, but they would change the tolerance.
    most = torch.maximum(raters.sum(1), upload(tuple(visual), rows.device))
    found: list[int] = torch.linalg.matrix_rank(rows, rtol=most * torch.finfo(rows.dtype).eps).tolist()
    return found


def recycled(
    x: Tensor,
    rows: Tensor,
    order: Tensor,
    stays: Tensor,
    behind: Tensor,
    counts: Sequence[tuple[int, int, int]],
    live: Sequence[int],
) -> Reduction:
    """Keep the best visual tokens, make clusters of the next best, and put these behind the former.

    Args:
        x: ``[B, N, D]`` what is clustered.
        rows: ``[B, V]`` the visual ones; ``order`` ``[B, V]`` places among them, best first.
        stays: ``[B, N]`` bool: rows that stay besides.
        behind: ``[B, 1]`` the row behind which the clusters come.
        counts: of each sample the tokens kept, those recycled, and the clusters made of them.
        live: rows that come out of each sample.
    """
    (batch, total, _), device = x.shape, x.device
    kept, _, made = zip(*counts)
    most, number = max(made), torch.arange(total, device=device)
    stays = stays | first_rows(order, rows, kept, total)
    ranking = rows.gather(1, order)
    joins, weight = torch.full((batch, total), -1, device=device), torch.ones(batch, total, device=device)
    centre = torch.full((batch, most), -1, device=device)
    for group in sorted(set(counts)):
        start, length, clusters = group
        if not clusters:
            continue
        sample = upload([b for b, of in enumerate(counts) if of == group], device)
        again = ranking[sample, start : start + length]
        centres, cluster = density_peaks(x[sample[:, None], again], clusters, clusters)
        size = torch.zeros_like(centres).scatter_add(1, cluster, torch.ones_like(cluster))
        joins[sample[:, None], again] = cluster
        weight[sample[:, None], again] = 1 / (size.gather(1, cluster) + 1e-6)
        centre[sample, :clusters] = again.gather(1, centres)
    # Rows stand in their order, clusters between the row that they come behind and the next; what goes is on the left.
    after = behind * (most + 1) + 1 + torch.arange(most, device=device)
    key = torch.cat([(number * (most + 1)).expand(batch, -1), after], dim=1)
    key = key.masked_fill(~torch.cat([stays, centre >= 0], dim=1), -1)
    order = key.argsort(dim=1, stable=True)
    first = total + most - max(live)
    slot = torch.zeros_like(order).scatter(1, order, torch.arange(total + most, device=device).expand_as(order)) - first
    taken = slot[:, total:].gather(1, joins.clamp(min=0)) if most else joins
    assignment = torch.where(stays, slot[:, :total], torch.where(joins >= 0, taken, -1))
    source = torch.cat([number.expand(batch, -1), centre], dim=1).masked_fill(key < 0, -1)
    return Reduction.merging(assignment, weight, source.gather(1, order)[:, first:])


@register
@dataclass(frozen=True)
class SparseVLM(Tokens):
    """Before each of ``layers`` keep the tokens that the raters attend to, and clusters of the next best."""

    name = "sparsevlm"
    title = "SparseVLM"
    group = "in_llm"
    paper = "arXiv 2410.04417"
    helps = "Questions of many words: those that have nothing to do with the picture have no say in what is kept of it."
    needs = ("decoder attention rows of the question (1 layer for each stage)",)
    identity_at = {"layers": None, "counts": (1.0, 1.0, 1.0), "rank": None}  # noqa: RUF012

    preset: Literal[192, 128, 96, 64] = 192
    """Budgets where ``counts`` gives none: about so many of 576 tokens in the mean over the layers of LLaVA-1.5-7B."""
    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Decoder layers before which tokens are dropped, counted from 0, by the attention of the one before; None = 3, 7 and
    16 of 32, and with ``rank`` 20, too."""
    counts: tuple[Annotated[int | float, CountOrShare("tokens")], ...] | None = None
    """What is kept of a sample before each of ``layers``, clusters not counted: a number of tokens, or a share of the
    original ones; None = the preset's."""
    rank: tuple[float, float] | None = None
    """Keep as many as the rank of the raters' attention times the first plus the second number, instead of ``counts``; the
    first release has (13.5, 0), (9, 6) and (0.8, 0) for 192, 128 and 64 tokens. None = fixed budgets."""
    recycle: Annotated[float, In(0, 1)] | None = 0.3
    """Share of the tokens dropped that is recycled, and one more; None = nothing is. Not with ``plus``."""
    clusters: Annotated[float, In(0, 1)] = 0.1
    """Share of the recycled tokens that clusters are made, and one more."""
    plus: bool = False
    """SparseVLM+: see above."""
    heads: Annotated[int, AtLeast(1)] = 14
    """Heads that count with ``plus``: of all, those in which the raters look at the picture most."""
    positions: Positions | None = None
    """Rotary positions of what stays; None = with ``plus`` their own, else renumbered at every stage where they are one row
    (``"auto"``)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.rank is None or self.counts is None, "counts", "must be None with rank, which sets them")

    def fitted(self, traits: Traits) -> Self:
        """Stages at the paper's shares of the depth, and the preset's at those of the tokens."""
        stages = (3, 7, 16) if self.rank is None else (3, 7, 16, 20)
        layers = self.layers if self.layers is not None else traits.same_depth(stages, of=32)
        kept = (KEPT_PLUS if self.plus else KEPT)[self.preset]
        counts = self.counts if self.counts is not None or self.rank is not None else tuple(k / TOKENS for k in kept)
        return replace(self, layers=layers, counts=counts, positions=self.positions or ("anchor" if self.plus else "auto"))

    def check(self, traits: Traits) -> str | None:
        """A budget for each layer; contiguous positions have no meaning under M-RoPE."""
        fit = self.fitted(traits)
        layers = fit.layers or ()
        if self.rank is None and len(fit.counts or ()) != len(layers):
            return f"counts={fit.counts}: must be one for each of layers={layers}"
        return traits.refuse_positions(self.positions) or traits.refuse_layers(
            "layers", layers, attention=tuple(layer - 1 for layer in layers)
        )

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Where the words are compared with the picture, and the inputs of the layers."""
        return (Site("sequence"), *(Site("decoder", layer) for layer in self.fitted(traits).layers or ()))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The question's attention in the layers before; with ``plus`` the width of their heads, and their rotation."""
        before = [layer - 1 for layer in self.fitted(traits).layers or ()]
        rows = tuple(_question(layer) for layer in before)
        if not self.plus:
            return rows
        return (*rows, *(s for layer in before for s in (_keys(layer), Function("rotate", layer))))

    def workspace(self, shape: Shape) -> int:
        """The question's rows of a layer; what is recycled as float32, and its distances."""
        rows = shape.attention(shape.rows - shape.visual)
        return shape.edits + 2 * rows + 2 * shape.floats(shape.hidden) + 3 * shape.pairs + 24 * shape.ids

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Note the raters; at a layer rank the visual rows of each sample jointly."""
        visual = layout.rows(*VISUAL)
        if not any(layout.visual):
            return None
        if site.kind == "sequence":
            self._note(x, visual, layout, state)
            return None
        kept = self._kept(site, layout)
        if kept == layout.visual:
            return None
        attention: Attention = seen[_question(site.layer - 1)]
        asking = last_of(layout.question, attention.lse.shape[2])
        raters = (state.get("prefill", RATERS).gather(1, asking.clamp(min=0)) > 0) & (asking >= 0)
        probabilities, heads = attention.probabilities(), None
        if self.plus:
            keys, _ = seen[_keys(site.layer - 1)]
            ones = torch.ones_like(keys[:, :1], dtype=torch.float32)
            turned = seen[Function("rotate", site.layer - 1)](ones, layout.positions)
            probabilities, heads = probabilities / rotation_alone(turned, asking.clamp(min=0))[:, None], self.heads
        rows = rated(probabilities, raters, visual, heads)
        if kept is None:
            kept = self._by_rank(ranks(rows, raters, layout.visual), layout)
        scores = rows.sum(1) / raters.sum(1, keepdim=True).clamp(min=1)
        return self._edit(x, scores, visual, kept, layout)

    def _note(self, x: Tensor, visual: Tensor, layout: Layout, state: State) -> None:
        rows, asking = last_of(visual, max(layout.visual)), layout.question_rows
        _, raters = rating(_taken(x, rows), rows >= 0, _taken(x, asking), asking >= 0)
        total = x.shape[1]
        noted = torch.zeros(len(x), total + 1, device=x.device).scatter(1, asking.masked_fill(~raters, total), 1.0)
        state.put("prefill", RATERS, noted[:, :total], rows=True)

    def _kept(self, site: Site, layout: Layout) -> tuple[int, ...] | None:
        """Tokens that are kept of each sample, None if that is the rank's to say."""
        if self.counts is None:
            return None
        budget = self.counts[(self.layers or ()).index(site.layer)]
        wanted = [budget if isinstance(budget, int) else round(budget * total) for total in layout.originals]
        return self._with_the_end(map(min, wanted, layout.visual), layout)

    def _by_rank(self, found: Sequence[int], layout: Layout) -> tuple[int, ...]:
        scale, bias = self.rank or (0.0, 0.0)
        kept = (n if r == n else max(min(int(r * scale + bias), n - 1), 0) for r, n in zip(found, layout.visual))
        return self._with_the_end(kept, layout)

    def _with_the_end(self, kept: Iterable[int], layout: Layout) -> tuple[int, ...]:
        """A row that predicts the next token is always kept."""
        return tuple(map(max, kept, layout.pinned or (0,) * len(layout.visual)))

    def _edit(self, x: Tensor, scores: Tensor, visual: Tensor, kept: tuple[int, ...], layout: Layout) -> Edit | None:
        positions = self.positions or "auto"
        if kept == layout.visual:
            return None
        if self.plus or self.recycle is None:
            return layout.keeping(top_rows(scores, visual, kept), kept, positions)
        predicting = layout.predicting
        rows = last_of(visual, max(layout.visual))
        ranking = ranked(scores).masked_fill(predicting, float("inf")).gather(1, rows.clamp(min=0))
        order = top_k(ranking.masked_fill(rows < 0, float("-inf")), rows.shape[1])
        behind = (visual & ~predicting).long() * torch.arange(x.shape[1], device=x.device)
        counts = [(k, *self._recycled(n - k)) for k, n in zip(kept, layout.visual)]
        came = tuple(k + made for k, _, made in counts)
        live = tuple(n - v + new for n, v, new in zip(layout.live, layout.visual, came))
        others = layout.valid & ~visual
        reduction = recycled(x, rows.clamp(min=0), order, others, behind.amax(1, keepdim=True), counts, live)
        return Edit(reduction, positions, live=live, visual=came)

    def _recycled(self, dropped: int) -> tuple[int, int]:
        """Tokens recycled, and clusters that they become."""
        again = min(int((self.recycle or 0) * dropped) + 1, dropped)
        return again, min(int(self.clusters * again) + 1, again)


def _question(layer: int) -> Rows:
    return Rows(Site("decoder", layer), "question")


def _keys(layer: int) -> KeyValue:
    return KeyValue(Site("decoder", layer))


def _taken(x: Tensor, rows: Tensor) -> Tensor:
    return x.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
