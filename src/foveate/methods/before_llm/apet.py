"""ApET: tokens that a few others cannot be put together to resemble stay, behind the encoder and once more inside the LLM.

Paper: "ApET: Approximation-Error Guided Token Compression for Efficient VLMs", arXiv 2602.19870. As the published code: a
basis of tokens far from each other, the error of a ridge regression of every token on it, the largest errors stay; then the
basis is written over those that stayed last, and all others join the one that they are most like, by a plain mean. The
default is LLaVA-1.5's 64 tokens on average: 96 and, from the middle of the depth on, 32. That of Qwen2.5-VL is ``keep=0.1``
and ``blend=0.5``, with ``ridge=0.1`` in its second stage. Differs: the basis begins with the first token, not with a random
one; who keeps all is left alone (the code permutes the basis); the small systems are solved in float64. Reconstructed: all
pictures of a prompt share the second stage (by an oversight the code cuts the first tokens of a LLaVA-NeXT picture alone),
each grid has the first one to itself. The form for Video-LLaVA, frame by frame, is not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.positions import Positions
from foveate.core.ranking import about
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import INDEX, Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.farthest import farthest_first
from foveate.ops.select import first_rows, top_k


def approximation_errors(x: Tensor, basis: Tensor, used: Tensor, ridge: float = 1e-5) -> Tensor:
    """How far each token is from what a ridge regression on the basis makes of it.

    Args:
        x: ``[I, N, D]``.
        basis: ``[I, M]`` tokens.
        used: ``[I, M]`` bool: those of them that there are.
        ridge: added to the diagonal of the basis' products.

    Returns:
        ``[I, N]`` Euclidean norms, float32.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    rows = _rows(x, basis).masked_fill(~used[..., None], 0)
    # Tokens that are alike make the products all but singular: in float32 the ridge would be lost among them.
    products = (rows @ rows.mT).double() + ridge * torch.eye(rows.shape[1], dtype=torch.float64, device=x.device)
    weights: Tensor = torch.linalg.solve_ex(products, (rows @ x.mT).double())[0]
    errors: Tensor = (x - weights.mT.to(x.dtype) @ rows).norm(dim=2)
    return errors.float()


def compressed(
    x: Tensor,
    valid: Tensor,
    errors: Tensor,
    basis: Tensor,
    kept: Sequence[int],
    size: Sequence[int],
    *,
    blend: float = 1.0,
    raster: bool = True,
) -> tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Which tokens stay, and what each of them is made of.

    Args:
        x: ``[I, N, D]``, compared by cosine.
        valid: ``[I, N]`` tokens that are no padding.
        errors: ``[I, N]``; the largest stay.
        basis: ``[I, M]`` tokens, of which the first ``size[i]`` count.
        kept: tokens to keep of each image, more than ``size[i]``.
        size: as above.
        blend: share that the basis has of the tokens that it is written over.
        raster: whether it is written in their raster order (encoder), or in that of their errors (language model).

    Returns:
        ``[I, K]`` those that stay, largest error first (behind ``kept[i]`` it means nothing); for each token the one that it
        joins, itself where it stays, and with which weight, ``[I, N]`` each; for each of the basis the token that it is
        written over, and with which weight, 0 where none, ``[I, M]`` each.
    """
    tokens, device = x.shape[1], x.device
    sizes = upload([list(kept), list(size)], device)[..., None]
    order = top_k(errors.masked_fill(~valid, float("-inf")), max(kept))
    number = torch.arange(order.shape[1], device=device).expand_as(order)
    stays = number < sizes[0]
    place = torch.zeros_like(valid, dtype=torch.long).scatter(1, order, number)
    there = torch.zeros_like(valid).scatter(1, order, stays)

    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    free = number < sizes[0] - sizes[1]  # the others are written over
    likeness = (unit @ _rows(unit, order).mT).masked_fill(~free[:, None], float("-inf"))
    target = torch.where(there, place, likeness.argmax(2))
    group = unit.new_zeros(order.shape).scatter_add(1, target, valid.float())
    weight = torch.where(free, 1 / group.clamp(min=1), 1 - blend).gather(1, target)

    basis_number = torch.arange(basis.shape[1], device=device).expand_as(basis)
    used = basis_number < sizes[1]
    over = order.gather(1, (sizes[0] - sizes[1] + basis_number).clamp(max=order.shape[1] - 1)).masked_fill(~used, tokens)
    over = over.sort(dim=1).values if raster else over
    return (
        order,
        (order.gather(1, target), weight.masked_fill(~valid, 0)),
        (over.clamp(max=tokens - 1), torch.where(used, blend, 0.0)),
    )


def edit_of(
    x: Tensor,
    layout: Layout,
    counts: Sequence[int],
    basis: int,
    first: Tensor | None = None,
    *,
    ridge: float = 1e-5,
    blend: float = 1.0,
    raster: bool = True,
    positions: Positions = "auto",
) -> Edit:
    """The edit that leaves ``counts[b]`` visual rows of ``x`` ``[B, N, D]``, with a basis of at most so many of them.

    ``first`` ``[B]`` says which of a sample's visual rows begins the basis (None: the first); the rest is of `compressed`.
    """
    rows = last_of(layout.rows(*VISUAL), max(layout.visual))
    valid, index = rows >= 0, rows.clamp(min=0)
    points = _rows(x, index)
    size = [min(basis, k - 1) if k < n else 0 for k, n in zip(counts, layout.visual)]
    start = valid.int().argmax(1) if first is None else first
    chosen = farthest_first(points, max(*size, 1), start, metric="euclidean", valid=valid)
    used = torch.arange(chosen.shape[1], device=x.device) < upload(size, x.device)[:, None]
    errors = approximation_errors(points, chosen, used, ridge)
    if any(layout.pinned):
        errors = errors.masked_fill(layout.predicting.gather(1, index), float("inf"))
    with about(torch.arange(len(x), device=x.device), index, layout.shape):
        order, joins, over = compressed(points, valid, errors, chosen, counts, size, blend=blend, raster=raster)
    edit = layout.keeping(first_rows(order, index, counts, x.shape[1]), tuple(counts), positions)
    return replace(edit, reduction=_merging(edit.reduction, rows, joins, chosen, over))


def _merging(
    kept: Reduction, rows: Tensor, joins: tuple[Tensor, Tensor], basis: Tensor, over: tuple[Tensor, Tensor]
) -> Reduction:
    """The sums that make the rows ``kept``: of tokens ``rows`` ``[B, V]`` as `compressed` says, others as they are."""
    batch, width, inputs = kept.shape
    index = rows.clamp(min=0)
    spare = torch.where(rows < 0, inputs, rows)
    every = torch.arange(inputs + 1, device=rows.device).expand(batch, -1)
    goal = every.scatter(1, spare, index.gather(1, joins[0]))[:, :inputs]
    weight = torch.ones_like(every, dtype=joins[1].dtype).scatter(1, spare, joins[1])[:, :inputs]
    number = torch.arange(width, device=rows.device).expand(batch, -1)
    slot = torch.full_like(every, -1).scatter(1, torch.where(kept.valid, kept.anchor, inputs), number)[:, :inputs]
    sample = torch.arange(batch, device=rows.device)[:, None]
    to = slot.gather(1, torch.cat([goal, index.gather(1, over[0])], dim=1))
    source = torch.cat([every[:, :inputs], index.gather(1, basis)], dim=1) + sample * inputs
    target = torch.where(to < 0, batch * width, to + sample * width)
    return Reduction(
        inputs, kept.anchor, (target.flatten(), source.flatten(), torch.cat([weight, over[1]], dim=1).flatten())
    )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


@register
@dataclass(frozen=True)
class ApET(Tokens):
    """Keep what a small basis approximates worst, merge the rest, in two places."""

    name = "apet"
    title = "ApET"
    group = "before_llm"
    paper = "arXiv 2602.19870"
    helps = "Any question, any encoder and any kernel: no attention is read and no question; what is like others is merged."
    needs = ("features or projected tokens", "decoder hidden states (1 layer)")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 32
    """Visual tokens that are left of a sample from ``layer`` on, all of its pictures together; a count must exceed
    ``basis``."""
    entering: Annotated[float, AtLeast(1)] = 3.0
    """How many times as many go to the language model, of each grid (a picture, or one tile or view of it)."""
    basis: Annotated[int, AtLeast(1)] = 10
    """Tokens that the others are approximated by; one less than what stays at most."""
    layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer, counted from 0, before which the second stage acts; None = the middle of the depth (16 of 32)."""
    ridge: Annotated[float, AtLeast(0)] = 1e-5
    """Penalty on the weights of the approximation."""
    blend: Annotated[float, In(0, 1)] = 1.0
    """Share that a token of the basis has of the token that it is written over: 1 for LLaVA, 0.5 for Qwen."""
    positions: Positions = "auto"
    """Rotary positions of what stays: renumbered in both stages where they are one row (``"contiguous"``), or their own."""

    def fitted(self, traits: Traits) -> Self:
        """The second stage in the middle of the depth."""
        return replace(self, layer=self.layer or traits.same_depth((16,), of=32)[0])

    def check(self, traits: Traits) -> str | None:
        """More tokens than the basis, a layer that exists, and positions that mean something."""
        if isinstance(self.keep, int) and self.keep <= self.basis:
            return f"keep={self.keep}: must be more than basis={self.basis}, which what stays is written over by"
        return traits.refuse_positions(self.positions) or traits.refuse_layers("layer", self.fitted(traits).layer or 0)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """In front of the projector, or behind it where rows there are no tokens, and a decoder layer."""
        first = Site("projected" if traits.refuse_sites("pre_projector") else "pre_projector")
        return first, Site("decoder", self.fitted(traits).layer or 0)

    def workspace(self, shape: Shape) -> int:
        """The tokens as given, at length 1 and their residues, and their likeness to those that stay."""
        tokens = max(shape.floats(shape.features), shape.floats(shape.hidden))
        return shape.edits + 5 * tokens + 2 * shape.pairs + 24 * shape.samples * shape.rows * INDEX

    def counts(self, site: Site, layout: Layout) -> tuple[int, ...]:
        """Tokens that stay of each grid, or later of each sample."""
        if site.kind == "decoder":
            budget, wholes = Budget(self.keep), layout.originals
        else:
            more = self.keep * self.entering
            budget = Budget(round(more) if isinstance(self.keep, int) else min(more, 1.0), "floor")
            wholes = tuple(items[0].count for items in layout.items)
        return tuple(min(budget.of(whole), alive) for whole, alive in zip(wholes, layout.visual))

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the visual rows of each grid, or of each sample, and merge them."""
        counts = self.counts(site, layout)
        if counts == layout.visual:
            return None
        raster = site.kind != "decoder"
        return edit_of(
            x,
            layout,
            counts,
            self.basis,
            ridge=self.ridge,
            blend=self.blend,
            raster=raster,
            positions=self.positions,
        )
