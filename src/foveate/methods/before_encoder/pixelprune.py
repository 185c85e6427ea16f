"""PixelPrune: cells of the picture that a neighbour predicts are not encoded.

A cell's predictor is its left or its upper neighbour, whichever the cell above left says that the picture goes on by, as in
lossless image coding; at threshold 0 only cells go that are equal to it, pixel by pixel. Paper: "PixelPrune: Pixel-Level
Adaptive Visual Token Reduction via Predictive Coding", arXiv 2604.00886. Thresholds are in the picture's own values, 0 to 1;
what a model is fed was divided by ``std``, which it does not tell. Reconstructed: frames of a video are pruned each on
its own; a neighbour that an earlier method dropped predicts nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In
from foveate.core.positions import TextAfter
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import FLOAT, Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable

Metric = Literal["max", "mean", "rms"]


def distance(a: Tensor, b: Tensor, metric: Metric) -> Tensor:
    """``[...]`` largest, mean or root mean square absolute difference of cells ``[..., P]``."""
    gap = (a - b).abs()
    return gap.amax(-1) if metric == "max" else gap.mean(-1) if metric == "mean" else gap.square().mean(-1).sqrt()


def predicted(cells: Tensor, there: Tensor, threshold: float = 0.0, metric: Metric = "max", anchored: bool = True) -> Tensor:
    """``[M, H, W]`` which cells their predictor stands for.

    Args:
        cells: ``[M, H, W, P]`` pixels of frames.
        there: ``[M, H, W]`` bool: which cells there are.
        threshold: largest distance at which cells are similar.
        metric: which distance.
        anchored: whether cells are compared with what their neighbours are taken for (a dropped one: its predictor's value),
            so that no cell is further than ``threshold`` from what stands for it. With threshold 0 that changes nothing.
    """
    if anchored and threshold > 0:
        return _anchored(cells, there, threshold, metric)
    left, above = torch.zeros_like(there), torch.zeros_like(there)
    left[:, :, 1:] = (distance(cells[:, :, 1:], cells[:, :, :-1], metric) <= threshold) & there[:, :, 1:] & there[:, :, :-1]
    above[:, 1:] = (distance(cells[:, 1:], cells[:, :-1], metric) <= threshold) & there[:, 1:] & there[:, :-1]
    on_left, above_left, left_above = torch.zeros_like(there), torch.zeros_like(there), torch.zeros_like(there)
    on_left[:, :, 1:] = there[:, :, :-1]
    above_left[:, :, 1:] = above[:, :, :-1]  # of the left neighbour
    left_above[:, 1:] = left[:, :-1]  # of the upper one
    return torch.where((above_left & ~left_above) | ~on_left, above, left)


def _anchored(cells: Tensor, there: Tensor, threshold: float, metric: Metric) -> Tensor:
    """The same against the reconstruction, one diagonal after the other: its cells do not depend on each other."""
    height, width = there.shape[1:]
    pad = torch.nn.functional.pad
    shown, known = pad(cells, (0, 0, 1, 0, 1, 0)), pad(there, (1, 0, 1, 0))  # a row and a column in front
    out = torch.zeros_like(there)
    for diagonal in range(height + width - 1):
        y = torch.arange(max(0, diagonal - width + 1), min(height, diagonal + 1))
        x = diagonal - y
        y, x = upload(y, cells.device), upload(x, cells.device)
        here, left, above, corner = ((y + dy, x + dx) for dy, dx in ((1, 1), (1, 0), (0, 1), (0, 0)))

        def near(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], shown: Tensor = shown, known: Tensor = known) -> Tensor:
            similar = distance(shown[:, a[0], a[1]], shown[:, b[0], b[1]], metric) <= threshold
            return similar & known[:, a[0], a[1]] & known[:, b[0], b[1]]

        upwards = (near(corner, left) & ~near(corner, above)) | ~known[:, left[0], left[1]]
        gone = torch.where(upwards, near(here, above), near(here, left))
        value = torch.where(upwards[..., None], shown[:, above[0], above[1]], shown[:, left[0], left[1]])
        shown[:, here[0], here[1]] = torch.where(gone[..., None], value, shown[:, here[0], here[1]])
        out[:, y, x] = gone
    return out


@register
@dataclass(frozen=True)
class PixelPrune(Tokens):
    """Encode cells that no neighbour predicts, each at its original place. Costs one host sync: how many there are."""

    name = "pixelprune"
    title = "PixelPrune"
    group = "before_encoder"
    paper = "arXiv 2604.00886"
    helps = (
        "Documents and screens: cells that repeat their neighbour are not even encoded, without training and, at threshold "
        "0, without losing a pixel. Photographs keep everything."
    )

    threshold: Annotated[float, In(0, 1)] = 0.0
    """Largest distance, in pixel values from 0 to 1, at which a cell counts as predicted; 0 = equal cells only."""
    metric: Metric = "max"
    """Distance of two cells: the largest absolute difference of their pixels, its mean, or the root of its mean square."""
    anchored: bool = True
    """Whether neighbours are compared as what stands for them, so that errors do not add up along a slope."""
    std: tuple[Annotated[float, AtLeast(1e-6)], ...] = (0.26862954, 0.26130258, 0.27577711)
    """What the processor divided each channel by (``image_std``; CLIP's and Qwen2-VL's by default, 0.5 each in Qwen3-VL)."""
    text_after: TextAfter = "keep"
    """Positions of text behind an image: their own (``"keep"``), or behind its largest kept one (``"follow"``)."""

    def check(self, traits: Traits) -> str | None:
        """Needs the encoder's input."""
        reason = traits.refuse_sites("patches")
        if reason is not None or traits.cell is None:
            return f"{reason}; use a method that acts behind the encoder, such as divprune"
        if len(self.std) != traits.cell[0]:
            return f"std={self.std}: must be one for each of the {traits.cell[0]} channels"
        return None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the encoder."""
        return (Site("patches"),)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How much a cell may differ."""
        return {"threshold": Range(0.0, 0.1)}

    def workspace(self, shape: Shape) -> int:
        """Copies of the pixels, shifted and subtracted."""
        return shape.edits + 8 * shape.images * shape.image_rows * shape.cell * FLOAT

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Lay the cells of all images out as frames, predict, keep the rest."""
        visual = layout.rows(*VISUAL)
        grids = [images[0] for images in layout.items]
        frames, width = max(grid.frames for grid in grids), max(grid.columns for grid in grids)
        heights = [grid.rows // grid.frames for grid in grids]
        height = upload(heights, x.device)[:, None]
        cell = layout.yx.clamp(min=0)
        frame, y = cell[..., 0].div(height, rounding_mode="floor"), cell[..., 0] % height
        size = (len(grids) * frames, max(heights), width)
        number = torch.arange(len(grids), device=x.device)[:, None]
        place = ((number * frames + frame) * size[1] + y) * width + cell[..., 1]
        std = upload(self.std, x.device).repeat_interleave(x.shape[2] // len(self.std))
        where = torch.where(visual, place, size[0] * size[1] * size[2]).flatten()  # padding has a place behind all others
        cells = x.new_zeros(size[0] * size[1] * size[2] + 1, x.shape[2], dtype=torch.float32)
        there = torch.zeros(len(cells), dtype=torch.bool, device=x.device)
        cells[where], there[where] = (x.float() * std).flatten(0, 1), True
        gone = predicted(cells[:-1].reshape(*size, -1), there[:-1].reshape(size), self.threshold, self.metric, self.anchored)
        kept = visual & ~gone.flatten()[place]
        counts = tuple(kept.sum(1).tolist())
        if counts == layout.visual:
            return None
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, counts))
        reduction = Reduction.keeping(kept | (layout.valid & ~visual), live)
        return Edit(reduction, positions="anchor", text_after=self.text_after, live=live, visual=counts)
