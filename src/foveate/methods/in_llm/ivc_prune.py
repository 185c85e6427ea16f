"""IVC-Prune: at a middle layer keep position anchors and the foreground, and cut all other visual tokens from every layer.

Paper: "Revealing the Implicit Visual Coordinates in LVLMs for Vision Token Pruning", arXiv 2602.03060. Anchors are the
tokens with the largest mean cosine and the largest mean sine in the rotary tables (the code's reading of the paper's
criterion), chosen from positions alone. The foreground are the tokens whose values are most like those of the question and
of a few seeds, the first that the question finds. ``mode="fixed"`` (Qwen2.5-VL) fills up to a target; ``"union"``
(LLaVA-1.5) adds the sets up, so counts are read from the device once.

Differs from the released code: every image is selected on its own; finished caches are cut in all layers (the LLaVA code
spares layer 0); mean cosines and sines are of float64 and rounded, so that grid cells (a, b) and (b, a), equal by the
formula, tie by index and not by noise; of a question of no more than ``skip`` tokens the last one asks. Picks are not
carried over from an overview to its details (InternVL2.5, DeepSeek-VL2). Reconstructed: the layer of other depths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.shape import FLOAT, Shape
from foveate.core.signal import Function, KeyValue, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import CHUNK, from_rows
from foveate.ops.select import top_k

Mode = Literal["fixed", "union"]


def rotary_means(rotate: Callable[[Tensor, Tensor], Tensor], positions: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Mean cosine and mean sine of the rotation at each position, over dimensions and the rows of the positions.

    A vector of ones in the first half and zeros in the second comes out as the cosines, then the sines, where halves are
    rotated into each other.

    Args:
        rotate: ``f(x [B, 1, N, width], positions [R, B, N])``.
        positions: ``[R, B, N]``; each row turns all frequencies, without M-RoPE's sections; a fourth row, in front, counts
            text only.
        width: of a head.

    Returns:
        Both ``[B, N]``, float64.
    """
    rows, batch, count = positions.shape
    probe = (torch.arange(width, device=positions.device) < width // 2).float().expand(batch, 1, count, width)
    turned = [rotate(probe, row.expand(rows, batch, count)) for row in positions[-3:]]
    mean = torch.stack(turned).double().mean(0)[:, 0]
    cos, sin = mean[..., : width // 2].mean(-1), mean[..., width // 2 :].mean(-1)
    return cos.round(decimals=9), sin.round(decimals=9)


def anchors(cos: Tensor, sin: Tensor, k: int) -> Tensor:
    """Mask ``[I, n]`` of the ``k`` largest of ``cos`` and the ``k`` largest of ``sin``, both ``[I, n]``."""
    best = torch.cat([top_k(cos, k), top_k(sin, k)], dim=1)
    return torch.zeros_like(cos, dtype=torch.bool).scatter(1, best, True)


def foreground(values: Tensor, keys: Tensor, image: Tensor, question: Tensor, seeds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Similarity of image tokens to the question, the best of them, and similarity to both.

    Args:
        values: ``[I, H, N, d]`` of all rows.
        keys: ``[I, N]`` bool, rows over which similarities are normalised.
        image: ``[I, n]`` rows of the image.
        question: ``[I, Q]`` rows, -1 = padding.
        seeds: how many of the best.

    Returns:
        Seed scores ``[I, n]``, seeds ``[I, seeds]`` (indices into ``image``), context scores ``[I, n]``.
    """
    asked = from_rows(values, values, question, keys[:, None]).gather(1, image)
    best = top_k(asked, seeds)
    near = from_rows(values, values, image.gather(1, best), keys[:, None]).gather(1, image)
    rows = (question >= 0).sum(1, keepdim=True)
    return asked, best, (rows * asked + seeds * near) / (rows + seeds)


def fill(scores: Tensor, first: Tensor, k: int, mode: Mode) -> Tensor:
    """Mask ``[I, n]``: all of ``first``, and the best ``scores`` up to ``k`` in all (fixed), or the best ``k`` (union)."""
    ranked = scores.masked_fill(first, float("inf")) if mode == "fixed" else scores
    return first.scatter(1, top_k(ranked, k), True)


@register
@dataclass(frozen=True)
class IVCPrune(Tokens):
    """Anchors, seeds and their like live on, in all layers."""

    name = "ivc_prune"
    title = "IVC-Prune"
    group = "in_llm"
    paper = "arXiv 2602.03060"
    helps = (
        "Questions about where things are: tokens that carry the sense of position stay. The caches of earlier layers "
        "are cut, too."
    )
    needs = ("decoder values (1 layer)", "rotary tables whose halves turn into each other")
    identity_at = {"target": 1.0, "context": 1.0}  # noqa: RUF012
    cuts_caches = True

    layer: Annotated[int, AtLeast(1)] | None = None
    """Tokens go at its input, counted from 0; None = 16 of 32, or 16 of 28 under M-RoPE."""
    mode: Literal["auto", "fixed", "union"] = "auto"
    """Whether the foreground fills up to ``target`` (``"fixed"``) or ``context`` is added to anchors and seeds
    (``"union"``); ``"auto"`` is fixed under M-RoPE, else union.
    """
    target: Annotated[float, In(0, 1)] = 0.5
    """Share of each image that stays (fixed), unless anchors and seeds are more."""
    context: Annotated[float, In(0, 1)] = 0.2
    """Share of each image that is most like question and seeds (union); anchors and seeds come on top."""
    anchor: Annotated[float, In(0, 1)] | None = None
    """Share of each image that each of cosine and sine chooses; None = 0.1 (fixed) or 0.05 (union)."""
    seed: Annotated[float, In(0, 1)] = 0.01
    """Share of each image that are seeds; at least one."""
    skip: Annotated[int, AtLeast(0)] = 2
    """Rows behind the image that are not yet the question."""

    def fitted(self, traits: Traits) -> Self:
        """The layer at the published share of the depth, and the family's mode."""
        mrope = traits.rotary_rows > 1
        (layer,) = traits.same_depth((16,), of=28 if mrope else 32)
        mode = self.mode if self.mode != "auto" else "fixed" if mrope else "union"
        return replace(self, layer=self.layer or layer, mode=mode)

    def check(self, traits: Traits) -> str | None:
        """The layer before must have values."""
        layer = self.fitted(traits).layer or 1
        return traits.refuse_layers("layer", layer, attention=(layer - 1,))

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of the layer."""
        return (Site("decoder", self.fitted(traits).layer or 1),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Values of the layer before, and the rotation."""
        (site,) = self.sites(traits)
        return KeyValue(Site("decoder", site.layer - 1)), Function("rotate", site.layer)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """The share of the mode."""
        return {"target" if self.fitted(traits).mode == "fixed" else "context": Range(0.02, 1.0, log=True)}

    def workspace(self, shape: Shape) -> int:
        """Likeness of values, rotations in float64, and a layer's cache while it is cut."""
        rotations = 8 * shape.samples * shape.rows * shape.head_width * FLOAT
        asked = shape.attention(min(CHUNK, max(shape.rows - shape.visual, self._seeds(shape.visual))))
        return shape.edits + asked + 4 * shape.keys + rotations

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Select in images of one size at a time."""
        mode: Mode = "fixed" if self.mode == "fixed" else "union"
        share = self.target if mode == "fixed" else self.context
        groups: dict[int, list[tuple[int, int]]] = {}
        for b, counts in enumerate(layout.alive):
            for number, count in enumerate(counts):
                groups.setdefault(count, []).append((b, number))
        groups.pop(0, None)
        if all(round(share * count) == count for count in groups):
            return None

        _, values = seen[KeyValue(Site("decoder", site.layer - 1))]
        cos, sin = rotary_means(seen[Function("rotate", site.layer)], layout.positions, values.shape[-1])
        question = self._question(layout)
        chosen = torch.zeros_like(layout.valid)
        for count, items in groups.items():
            sample = upload([b for b, _ in items], x.device)
            image = layout.where(items)
            own = torch.zeros_like(layout.valid[sample]).scatter(1, image, True)
            keys = own if mode == "fixed" else layout.prompt[sample]
            first = anchors(cos[sample].gather(1, image), sin[sample].gather(1, image), self._anchors(count, mode))
            with about(sample, image, layout.shape):
                _, seeds, like = foreground(values[sample], keys, image, question[sample], self._seeds(count))
                kept = fill(like, first.scatter(1, seeds, True), round(share * count), mode)
            chosen[sample[:, None], image] = kept
        visual = self._known(layout, mode) or tuple(chosen.sum(1).tolist())
        return layout.keeping(chosen, visual, all_layers=True)

    def _question(self, layout: Layout) -> Tensor:
        """``[B, Q]`` rows of the question but for the first ``skip`` ones, -1 = padding."""
        rows = layout.question_rows
        left = (rows >= 0).flip(1).cumsum(1).flip(1)  # rows from here to the end
        most = (left[:, :1] - self.skip).clamp(min=1)
        return rows.masked_fill(left > most, -1)

    def _seeds(self, count: int) -> int:
        return max(1, round(self.seed * count))

    def _anchors(self, count: int, mode: Mode) -> int:
        share = self.anchor if self.anchor is not None else 0.1 if mode == "fixed" else 0.05
        return round(share * count)

    def _known(self, layout: Layout, mode: Mode) -> tuple[int, ...] | None:
        """What stays of each sample, where the target cannot be exceeded."""
        counts = [[(count, round(self.target * count)) for count in sample] for sample in layout.alive]
        within = all(2 * self._anchors(n, mode) + self._seeds(n) <= k for sample in counts for n, k in sample if n)
        return tuple(sum(k for _, k in sample) for sample in counts) if mode == "fixed" and within else None
