"""Quant Experts: what rounding loses comes back by one product of low rank for all tokens, and by one of several for each.

Paper: "Quant Experts: Token-aware Adaptive Error Reconstruction with Mixture of Experts for Large Vision-Language Models
Quantization", arXiv 2602.24059. No code is published; the card's worked examples and closed forms hold it. Inputs that are
important for nearly all tokens are left out of rounding and made up for by the shared product; those that are important for
some are grouped by how often they are so together, and each group has a product that a router chooses by a token's
magnitudes. Reconstructed: by how much the former are divided, what weighs the error in a group's product (`weighting`), the
router (it bounds each product's error from above), both losses of the refinement, and that statistics are those of the
unquantized model. Group size and symmetry of the paper's tables are not stated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.parameters import AtLeast
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.weights import Bits, Block, Replaced, Side, Weights
from foveate.ops.grid import Grid
from foveate.ops.solve import Moments, whitened
from foveate.ops.spectral import npmi, spectral

FLOOR = 1e-3
"""What an error weighs in inputs outside of a group, as a share of the mean of all inputs."""


def marks(x: Tensor, weight: Tensor, count: int) -> Tensor:
    """``[n, in]`` bool: the ``count`` inputs of each row ``x`` ``[n, in]`` with the largest magnitude times ``weight``."""
    places = (x.abs() * weight).topk(count, dim=-1).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, places, True)


def parted(counts: Tensor, shared: int, routed: int) -> tuple[Tensor, Tensor]:
    """Inputs that are important to most tokens, at most ``shared``, and the ``routed`` next ones; the first of equals.

    Args:
        counts: ``[in]`` tokens that each input is important for.
    """
    order = counts.argsort(descending=True, stable=True)
    return order[:shared], order[shared : shared + routed]


def divisors(size: Tensor, shared: Tensor) -> Tensor:
    """``[in]`` what inputs are divided by: the ``shared`` ones by the root of how much larger than the others they are.

    Args:
        size: ``[in]`` mean magnitudes.
        shared: some of them; all others are left alone.
    """
    others = torch.ones_like(size, dtype=torch.bool).index_fill_(0, shared, False)
    scale = torch.ones_like(size)
    if not bool(others.any()):
        return scale
    return scale.index_copy_(0, shared, (size[shared] / size[others].mean().clamp(min=1e-12)).sqrt().clamp(min=1))


def routed(residual: Tensor, size: Tensor, inside: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``[out, r]`` and ``[r, in]`` nearest to ``residual`` ``[out, in]``, errors in a group of inputs weighing more.

    Args:
        size: ``[in]`` root of the mean square of each input.
        inside: ``[in]`` bool: the group.
    """
    floor = FLOOR * size.mean()
    weight = torch.where(inside, size, floor).clamp(min=floor).clamp(min=torch.finfo(size.dtype).tiny)
    left, value, right = torch.linalg.svd(residual * weight, full_matrices=False)
    return left[:, :rank] * value[:rank], right[:rank] / weight


def router(residual: Tensor, downs: Tensor, ups: Tensor) -> Tensor:
    """``[E, in]`` mean magnitudes, over outputs, of what each product leaves of ``residual`` ``[out, in]``.

    ``router |x|`` is never less than the mean magnitude of what is missing in the output for ``x``.
    """
    return torch.stack([(residual - up.mT @ down).abs().mean(0) for down, up in zip(downs, ups, strict=True)])


def losses(x: Tensor, residual: Tensor, side: Side) -> tuple[Tensor, Tensor]:
    """What the refinement lowers, for the inputs ``x`` ``[n, in]``.

    Returns:
        The mean square of what the chosen products leave of the ``residual`` ``[out, in]``, and the divergence of the
        router's choice from one by what each product leaves.
    """
    assert side.router is not None
    inner = torch.einsum("ni,eri->ner", x, side.down)
    missing = (x @ residual.mT)[:, None] - torch.einsum("ner,ero->neo", inner, side.up)
    bound = x.abs() @ side.router.mT
    chosen = missing.gather(1, bound.argmin(-1)[:, None, None].expand(-1, 1, missing.shape[-1]))
    true = missing.detach().abs().mean(-1)
    unit = true.mean(-1, keepdim=True).clamp(min=torch.finfo(true.dtype).tiny)
    rules = (-bound / unit).log_softmax(-1), (-true / unit).log_softmax(-1)
    return chosen.square().mean(), functional.kl_div(*rules, reduction="batchmean", log_target=True)


@dataclass(eq=False)
class Seen:
    """What the samples feed a linear.

    Attributes:
        weight: ``[in]`` mean magnitudes of its weight.
        counts: ``[in]`` tokens that each input is important for.
        size: ``[in]`` mean magnitudes of the inputs.
        own: ``[in, in]`` mean of ``x x^T``.
    """

    weight: Tensor
    counts: Tensor
    size: Tensor
    own: Tensor


@register
@dataclass(frozen=True)
class QuantExperts(Weights):
    """A shared and several routed products of low rank."""

    name = "quant_experts"
    title = "Quant Experts"
    group = "weights"
    paper = "arXiv 2602.24059"
    helps = (
        "For few bits of activations, too, where the inputs that matter differ from token to token; in every forward, steps "
        "of decoding as well, products of low rank come on top in each linear."
    )
    ordinary: ClassVar[bool] = False
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16, "activations": 16}

    activations: Bits = 8
    """Bits that each row of a linear's input is rounded to on the way; 16 = none. The paper has 8 and 6 with
    weights of 4 bits, and 16 with weights of 3."""
    important: Annotated[int, AtLeast(0)] = 32
    """Inputs that count as important to a token."""
    experts: Annotated[int, AtLeast(1)] = 8
    """Products that are chosen among for each token."""
    shared_rank: Annotated[int, AtLeast(0)] = 32
    """Rank of the product for all tokens."""
    routed_rank: Annotated[int, AtLeast(0)] = 32
    """Rank of each of the others."""
    exclude: bool = True
    """Whether inputs that are important to most tokens are left out of rounding."""
    weighting: Literal["channels", "tokens"] = "channels"
    """What errors weigh in a group's product: by the group's inputs, or (own) by the tokens that they are important to."""
    epochs: Annotated[int, AtLeast(0)] = 0
    """How often products and router learn from all batches after that; 0 = not at all. The paper has 1,600 steps."""
    rate: Annotated[float, AtLeast(0)] = 1e-4
    """Step size of the learning, which falls from epoch to epoch along half a cosine."""

    def __post_init__(self) -> None:
        super().__post_init__()
        enough = not self.exclude or self.shared_rank >= self.important
        self.require(enough, "shared_rank", f"must be important={self.important} or more, or what is left out would be lost")

    def workspace(self, shape: Shape) -> int:
        """Each row divided, by the products of all experts, as they are and as they are chosen, and what is added."""
        numbers = 3 * self.experts * self.routed_rank + self.shared_rank + 3 * max(shape.inner, shape.width)
        return super().workspace(shape) + shape.samples * shape.rows * numbers * shape.itemsize

    def quantize(self, block: Block) -> None:
        """Place every linear, one like the other."""
        for names in block.groups:
            seen = self.seen(block, names)
            for name in names:
                block.place(name, self.replaced(block, name, seen[name]))

    def seen(self, block: Block, names: Sequence[str]) -> dict[str, Seen]:
        """What the samples feed these linears, which share their input."""
        first = block.weight(names[0])
        moments, size, total = Moments(first.shape[1], device=first.device), first.new_zeros(first.shape[1]), 0
        weights = {name: block.weight(name).abs().mean(0) for name in names}
        counts = {name: torch.zeros_like(size, dtype=torch.long) for name in names}
        for rows in block.exact(names[0]):
            x = rows.x.float()
            moments.add(x, samples=len(x))
            size, total = size + x.abs().sum(0), total + len(x)
            for name in names:
                counts[name] += self.of(x, weights[name]).sum(0)
        return {name: Seen(weights[name], counts[name], size / total, moments.own / 2) for name in names}

    def of(self, x: Tensor, weight: Tensor) -> Tensor:
        """``[n, in]`` bool: inputs that are important to each row."""
        return marks(x, weight, min(self.important, x.shape[-1]))

    def replaced(self, block: Block, name: str, seen: Seen) -> Replaced:
        """What stands for a linear."""
        weight = block.weight(name)
        shared, others = parted(seen.counts, self.important, self.important * self.experts)
        divide = divisors(seen.size, shared).to(block.dtype).float()
        scaled = weight * divide
        rest = scaled.index_fill(1, shared, 0) if self.exclude else scaled
        grid = Grid.of(rest, self.bits, self.group_size, self.symmetric, stored=block.dtype)
        integers = grid.integers(rest)
        own = seen.own / divide / divide[:, None]
        missing, sides = scaled.to(own.dtype) - grid.values(integers), list[Side]()
        if self.shared_rank:
            left, right = whitened(missing, own, self.shared_rank)
            sides.append(_stored(right[None], left.mT[None], None, block.dtype))
            missing = missing - (sides[0].up[0].mT.to(own.dtype) @ sides[0].down[0].to(own.dtype))
        if self.routed_rank and len(others):
            groups = self.groups(block, name, seen, others)
            downs, ups = self.products(missing, own, groups, lambda: self.served(block, name, seen, groups, divide))
            found = Side(downs, ups, router(missing, downs, ups))
            if self.epochs:
                found = self.refined(missing, found, lambda: (rows.x / divide for rows in block.exact(name)))
            sides.append(_stored(found.down, found.up, found.router, block.dtype))
        return Replaced(grid, integers, divide, self.activations, sides=tuple(sides))

    def groups(self, block: Block, name: str, seen: Seen, others: Tensor) -> Tensor:
        """``[E, in]`` bool: which of the inputs ``others`` are in each group, by how often they are important together."""
        joint, total = torch.zeros(len(others), len(others), dtype=torch.double, device=others.device), 0
        for rows in block.exact(name):
            there = self.of(rows.x.float(), seen.weight)[:, others].double()
            joint, total = joint + there.mT @ there, total + len(there)
        count = min(self.experts, len(others))
        label = spectral(npmi(joint / total), count)
        groups = torch.zeros(count, len(seen.weight), dtype=torch.bool, device=others.device)
        groups[label, others] = True
        return groups

    def products(self, missing: Tensor, own: Tensor, groups: Tensor, served: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """Factors ``[E, r, in]`` and ``[E, r, out]`` of what each group gives back of ``missing`` ``[out, in]``."""
        if self.weighting == "tokens":
            found = [whitened(missing, moments if bool(moments.any()) else own, self.routed_rank) for moments in served()]
        else:
            size = own.diagonal().sqrt()
            found = [routed(missing, size, inside, self.routed_rank) for inside in groups]
        return torch.stack([right for _, right in found]), torch.stack([left.mT for left, _ in found])

    def served(self, block: Block, name: str, seen: Seen, groups: Tensor, divide: Tensor) -> Tensor:
        """``[E, in, in]`` moments of the tokens that have most of their important inputs in each group."""
        found = torch.zeros(len(groups), *seen.own.shape, dtype=seen.own.dtype, device=groups.device)
        for rows in block.exact(name):
            x = rows.x.float()
            hits = self.of(x, seen.weight).float() @ groups.float().mT
            most, place = hits.max(-1)
            x = (x / divide).to(found.dtype)
            for group in range(len(groups)):
                mine = x[(place == group) & (most > 0)]
                found[group].addmm_(mine.mT, mine)
        return found

    @torch.enable_grad()
    def refined(self, missing: Tensor, start: Side, batches: Callable[[], Iterable[Tensor]]) -> Side:
        """Products and router that give back more of ``missing`` ``[out, in]``, from a ``start``.

        Args:
            missing: what the shared product leaves.
            start: the closed form.
            batches: rows ``[n, in]`` of each batch, divided; asked for once an epoch.
        """
        assert start.router is not None
        residual = missing.float()
        leaves = [part.float().clone().requires_grad_() for part in (start.down, start.up, start.router)]
        optimiser = torch.optim.AdamW(leaves, lr=self.rate)
        falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, self.epochs)
        for _ in range(self.epochs):
            for x in batches():
                optimiser.zero_grad()
                regression, classification = losses(x.float(), residual, Side(*leaves))
                (regression + classification).backward()  # type: ignore[no-untyped-call]
                optimiser.step()
            falling.step()
        down, up, route = (leaf.detach() for leaf in leaves)
        return Side(down, up, route)


def _stored(down: Tensor, up: Tensor, route: Tensor | None, dtype: torch.dtype) -> Side:
    """As it is written: what comes after it goes by that."""
    return Side(*(part if part is None else part.to(dtype).float().contiguous() for part in (down, up, route)))  # type: ignore[arg-type]
