"""MASQuant: each modality has a learned scale of its own, one weight serves all, and its errors for pictures are mended.

Paper: "MASQuant: Modality-Aware Smoothing Quantization for Multimodal Large Language Models", arXiv 2603.04800. The stored
weight is rounded behind the scale of text; for rows of pictures (and line ends between them) and of sound a product of low
rank is added, the best of its rank on what samples feed the linear. As in the published code the last linear of a block
(down_proj) has neither, scales start from those of queries and of up_proj, rounding passes gradients straight, and a step of
decoding is text. A step of the training is a batch (there: one sample), each of whose samples counts alike; scales are kept
from zero after the last step, too. Own readings: the low rank is that of what reaches a linear in the quantized model, and a
small ridge stands for directions that no sample shows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.parameters import AtLeast, In
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Role
from foveate.core.shape import Shape
from foveate.core.weights import Bits, Block, ForRoles, Inspected, Replaced, Side, Stand, Stream, Weights
from foveate.methods.weights.mbq import gradient_ratio
from foveate.ops.grid import Grid, passing
from foveate.ops.scaling import smoothing
from foveate.ops.solve import Moments, whitened

MODALITIES: Mapping[str, tuple[int, ...]] = {"vision": (*VISUAL, Role.NEWLINE), "audio": (Role.AUDIO,)}
"""Roles of each modality; all other rows are text."""
LEAST = 1e-2
"""The smallest magnitude of a scale while it is learned."""
NUDGE = 1e-5
"""The smallest range of an input, and what the published training adds to a scale that inputs are divided by."""
FEWEST = 32
"""The lowest rank that is asked for."""
LARGEST = 65500.0
"""Factors are cut to what half precision holds."""

Scales = Mapping[str, Tensor]
"""``[in]`` by modality, ``text`` among them."""


def modality(role: Tensor) -> dict[str, Tensor]:
    """Bool, in the shape of ``role``: rows of each modality, padding in none."""
    found = {name: torch.isin(role, role.new_tensor(roles)) for name, roles in MODALITIES.items()}
    return {"text": (role != Role.PAD) & ~torch.stack([*found.values()]).any(0)} | found


def ranges(x: Tensor, role: Tensor) -> dict[str, Tensor]:
    """``[in]`` the largest magnitudes of ``x`` ``[n, in]`` over the rows of each modality that is there, at least 1e-5."""
    there = {name: rows for name, rows in modality(role).items() if bool(rows.any())}
    return {name: x[rows].abs().amax(0).float().clamp(min=NUDGE) for name, rows in there.items()}


def rank_of(rank: float, shape: Sequence[int]) -> int:
    """A share of the smaller side of a weight of ``shape`` (a number, above 1); at least 32, and never above that side."""
    most = min(shape)
    return min(max(int(rank * most) if rank <= 1 else int(rank), FEWEST), most)


def learning(weight: Tensor, scales: Scales, role: Tensor, grid: Callable[[Tensor], Grid], activations: int = 16) -> Stand:
    """The product with a weight in training: each modality behind its own scale, with a weight rounded behind that.

    Args:
        weight: ``[out, in]``.
        scales: by modality; none: nothing is scaled.
        role: ``[B, T]`` of the rows that come; padding makes zeros.
        grid: of a weight.
        activations: bits of inputs; 16 = as they are.
    """

    def rounded(weight: Tensor) -> Tensor:
        return grid(weight).passing(weight)

    def product(x: Tensor) -> Tensor:
        if not scales:
            return functional.linear(passing(x, activations), rounded(weight).to(x.dtype))
        rows = x.reshape(-1, x.shape[-1])
        made = rows.new_zeros(len(rows), len(weight))
        for name, mask in modality(role.flatten().to(x.device)).items():
            scale = scales.get(name)
            if scale is not None:
                index = mask.nonzero()[:, 0]
                part = passing(rows[index] / (scale + NUDGE).to(x.dtype), activations)
                made = made.index_copy(0, index, functional.linear(part, rounded(weight * scale).to(x.dtype)))
        return made.reshape(*x.shape[:-1], -1)

    return product


def mended(missing: Tensor, moments: Tensor, rank: int) -> Side:
    """The product of low rank nearest to a ``missing`` weight ``[out, in]`` on inputs of ``moments`` ``[in, in]``."""
    left, right = (part.clamp(-LARGEST, LARGEST) for part in whitened(missing, moments, rank))
    return Side(right[None], left.mT[None].contiguous())


@register
@dataclass(frozen=True)
class MASQuant(Weights):
    """Scales by modality, and low ranks for all but text."""

    name = "masquant"
    title = "MASQuant"
    group = "weights"
    paper = "arXiv 2603.04800"
    helps = (
        "For few bits of activations, too, where inputs of pictures are far larger than those of words; steps of decoding "
        "cost nothing more, pictures a product of low rank in each linear."
    )
    textual = False
    streams: ClassVar[tuple[Stream, ...]] = ("exact", "reached")
    ordinary: ClassVar[bool] = False
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16, "activations": 16}

    activations: Bits = 8
    """Bits that each row of a linear's input is rounded to on the way; 16 = none. With 16 the paper has
    ``group_size=128, symmetric=False``."""
    alpha: Annotated[float, In(0, 1)] = 0.5
    """Share of the difficulty that goes from activations to weights, before scales are learned."""
    scales: Literal["split", "merged"] = "split"
    """Whether linears that share an input learn a scale each, or one together."""
    epochs: Annotated[int, AtLeast(0)] = 2
    """How often all batches are learned from; the paper has 256 steps, of one sample each."""
    rate: Annotated[float, AtLeast(0)] = 5e-2
    """Step size of the learning."""
    vision: Annotated[float, AtLeast(0)] | None = None
    """What an error of a picture's row weighs, one of text weighing 1 (0.126 in the paper for Qwen2.5-VL-3B); None = by how
    much the loss depends on either, the most of all blocks."""
    audio: Annotated[float, AtLeast(0)] | None = None
    """The same of rows of sound."""
    rank: Annotated[float, AtLeast(0)] = 0.2
    """Rank of what is added, as a share of the smaller side of a weight, or a number if above 1; at least 32."""
    towards: Literal["float", "rounded"] = "float"
    """What it mends towards: the float weight, or that rounded behind the modality's own scale."""

    def quantize(self, block: Block) -> None:
        """Learn the scales of the block, then place one group of linears after the other."""
        found = self.initial(block)
        if self.epochs:
            found = self.learned(block, found)
        for names in block.groups:
            moments = self.moments(block, names[0], found[names[0]])
            for name in names:
                scales = {kind: scale.to(block.dtype).float() for kind, scale in found[name].items()}
                block.place(name, self.replaced(block.weight(name), scales, moments, block.dtype))

    def workspace(self, shape: Shape) -> int:
        """What rows are divided by, those of pictures, and what is added for them."""
        return super().workspace(shape) + 4 * shape.samples * shape.rows * max(shape.inner, shape.width) * shape.itemsize

    def grid(self, weight: Tensor, stored: torch.dtype | None = None) -> Grid:
        """Of a weight behind its scale."""
        return Grid.of(weight, self.bits, self.group_size, self.symmetric, stored=stored)

    def initial(self, block: Block) -> dict[str, dict[str, Tensor]]:
        """For each linear its scales before any learning; none of the last."""
        last, found = block.groups[-1], {name: dict[str, Tensor]() for name in block.groups[-1]}
        upper = block.feeder(last[0])
        for names in (names for names in block.groups if names != last):
            weight, most = block.weight(upper if upper in names else names[0]), dict[str, Tensor]()
            for rows in block.exact(names[0]):
                for kind, size in ranges(rows.x, rows.role).items():
                    most[kind] = torch.maximum(most.get(kind, size), size)
            if "vision" not in most and block.number == 0 and names == block.groups[0]:
                block.say(f"{self.name}: no sample shows a picture, so pictures will be taken for text")
            found |= {name: {kind: smoothing(size, [weight], self.alpha) for kind, size in most.items()} for name in names}
        return found

    @torch.enable_grad()
    def learned(self, block: Block, found: Mapping[str, Scales]) -> dict[str, dict[str, Tensor]]:
        """Scales by which the block, on what quantized blocks before it make, comes nearest to the unquantized model."""
        first = {name: names[0] if self.scales == "merged" else name for names in block.groups for name in names}
        leaves = {
            (name, kind): scale.clone().requires_grad_()
            for name in dict.fromkeys(first.values())
            for kind, scale in found[name].items()
        }
        scales = {name: {kind: leaves[first[name], kind] for kind in found[name]} for name in first}
        if not leaves:
            return scales
        weights = {name: block.weight(name) for name in first}
        heed = self.heed(block, {kind for _, kind in leaves})
        optimiser, lost = torch.optim.AdamW(leaves.values(), lr=self.rate, weight_decay=0.0), 0
        for _ in range(self.epochs):
            for exact, reached in zip(block.inspect(()), block.inspect((), "reached"), strict=True):
                with torch.no_grad():
                    wanted = exact.run(exact.x)
                _kept_from_zero(leaves.values())
                optimiser.zero_grad()
                stands = {
                    name: learning(weight, scales[name], reached.role, self.grid, self.activations)
                    for name, weight in weights.items()
                }
                off = (reached.run(reached.x, stands) - wanted).float().abs().mean(-1)
                (off * _weights(reached, heed)).sum().backward()  # type: ignore[no-untyped-call]
                if all(bool(leaf.grad.isfinite().all()) for leaf in leaves.values() if leaf.grad is not None):
                    optimiser.step()
                else:
                    lost += 1
        if lost:
            block.say(
                f"{self.name}: block {block.number}: slopes of {lost} steps are not finite in {block.dtype} and were left "
                "out; quantize the model in bfloat16 or float32"
            )
        _kept_from_zero(leaves.values())
        return {name: {kind: scale.detach() for kind, scale in of.items()} for name, of in scales.items()}

    def heed(self, block: Block, kinds: Collection[str]) -> dict[str, float]:
        """What an error of a row weighs, by the ``kinds`` of rows that there are."""
        found, last = {"text": 1.0}, block.groups[-1][-1]
        for kind, value in (("vision", self.vision), ("audio", self.audio)):
            if kind in kinds:
                slopes = block.slopes(last) if value is None else ()
                found[kind] = max((gradient_ratio(batches, MODALITIES[kind]) for batches in slopes), default=value or 0.0)
        return found

    def moments(self, block: Block, name: str, kinds: Collection[str]) -> dict[str, Tensor]:
        """By modality other than text, ``[in, in]`` second moments (any multiple of them) of what reaches a linear."""
        others = [kind for kind in kinds if kind != "text"]
        sums: dict[str, Moments] = {}
        for rows in block.reached(name) if others else ():
            masks = modality(rows.role)
            for kind in others:
                sums.setdefault(kind, Moments(rows.x.shape[1], device=rows.x.device)).add(rows.x[masks[kind]])
        return {kind: one.own for kind, one in sums.items()}

    def replaced(
        self, weight: Tensor, scales: Scales, moments: Mapping[str, Tensor], stored: torch.dtype | None = None
    ) -> Replaced:
        """What stands for a linear.

        Args:
            weight: ``[out, in]``.
            scales: by modality; none: nothing is scaled, and nothing mended.
            moments: ``[in, in]`` of the inputs of each modality but text, as they are.
            stored: the dtype that steps and factors are written in.
        """
        if not scales:
            grid = self.grid(weight, stored)
            return Replaced(grid, grid.integers(weight), activations=self.activations)
        grid = self.grid(weight * scales["text"], stored)
        integers = grid.integers(weight * scales["text"])
        base, rank, others = grid.values(integers), rank_of(self.rank, weight.shape), []
        for kind, own in moments.items():
            mine, scale = weight * scales[kind], scales[kind].to(own.dtype)
            target = mine if self.towards == "float" else self.grid(mine).rounded(mine)
            side = mended(target - base, own / scale / scale[:, None], rank)
            down, up = (part.to(stored or part.dtype).float() for part in (side.down, side.up))
            others.append(ForRoles(tuple(map(int, MODALITIES[kind])), scales[kind], (Side(down, up),)))
        return Replaced(grid, integers, scales["text"], self.activations, by_role=tuple(others))


def _kept_from_zero(scales: Iterable[Tensor]) -> None:
    with torch.no_grad():
        for scale in scales:
            scale.copy_(torch.where(scale < 0, scale.clamp(max=-LEAST), scale.clamp(min=LEAST)))


def _weights(part: Inspected, heed: Mapping[str, float]) -> Tensor:
    """What rows ``[B, T]`` of a part weigh: samples alike, in each the mean over its rows, modalities by ``heed``."""
    role = part.role.to(part.x.device)
    rows = sum(mask * heed.get(kind, 0.0) for kind, mask in modality(role).items())
    found: Tensor = rows / (role != Role.PAD).sum(-1, keepdim=True) / len(role)
    return found
