"""VidCom2: of a video, the tokens stay that are least like the whole and their own frame, more of frames of their own kind.

Paper: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", arXiv 2505.14454.
How alike two things are is a sum of Gaussians of several widths of their distance, at length 1, in the half of the channels
that vary least over the video. The less a frame is like the mean of the whole, the larger its share, by a softmax with a low
temperature; in each frame the tokens stay that are least like both means. The authors' code leaves it at the frames' shares,
whose sum is about the budget; as vLLM does (``--video-pruning-method vidcom2``), tokens are then added, or taken from all
that stay, by likeness, so that exactly ``keep`` live, but one of each frame at least. Features are float32. Reconstructed: a
picture is a video of one frame, each picture and tile on its own, unless ``Session.films`` says what it is a frame of;
behind a method that dropped tokens, shares and means are of those that are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import AtLeast, In
from foveate.core.positions import Positions
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.roles import Item
from foveate.core.shape import Shape
from foveate.ops.select import top_k

WIDTHS: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Variances of the Gaussians."""


def likeness(x: Tensor, frame: Tensor, frames: int, channels: float) -> tuple[Tensor, Tensor]:
    """How much each token is like the mean of the whole video, and like that of its frame: ``[I, n]`` each, float32.

    Args:
        x: ``[I, n, D]`` tokens.
        frame: ``[I, n]`` the frame of each.
        frames: how many there are.
        channels: share of them that are compared, those that vary least.
    """
    x = x.float()
    still = top_k(-x.var(1, correction=0), max(1, int(channels * x.shape[2])))
    unit = torch.nn.functional.normalize(x.gather(2, still[:, None].expand(-1, x.shape[1], -1)), dim=2)
    index = frame[..., None].expand_as(unit)
    sums = unit.new_zeros(len(x), frames, unit.shape[2]).scatter_add(1, index, unit)
    means = sums / _counts(frame, frames).clamp(min=1)[..., None]
    return _gaussians(unit, unit.mean(1, keepdim=True)), _gaussians(unit, means.gather(1, index))


def shares(of_video: Tensor, frame: Tensor, frames: int, keep: float, temperature: float) -> Tensor:
    """Tokens that each frame is to keep, ``[I, frames]``: at least one, where it has any, and no more than it has.

    Args:
        of_video: ``[I, n]`` how much each token is like the whole video.
        frame: ``[I, n]`` the frame of each.
        frames: how many there are.
        keep: share of all tokens that is to stay.
        temperature: of the softmax over frames.
    """
    counts = _counts(frame, frames)
    sums = torch.zeros_like(counts, dtype=of_video.dtype).scatter_add(1, frame, of_video)
    own = (-sums / counts.clamp(min=1)).masked_fill(counts == 0, float("-inf"))
    weight = (own / temperature).softmax(1)
    scale = (keep * (1 + weight - weight.sum(1, keepdim=True) / (counts > 0).sum(1, keepdim=True))).clamp(max=1.0)
    return (scale * counts).round().long().clamp(min=1).minimum(counts)


def retained(alike: Tensor, frame: Tensor, wanted: Tensor, k: int) -> Tensor:
    """Indices ``[I, k]`` of the tokens that stay, those first that their frame keeps, and of these the least alike.

    Args:
        alike: ``[I, n]``, low = to be kept.
        frame: ``[I, n]`` the frame of each.
        wanted: ``[I, frames]`` tokens that each is to keep.
        k: how many are to stay in all.
    """
    order = ranked(-alike).argsort(dim=1, descending=True, stable=True)
    grouped, by_frame = frame.gather(1, order).sort(dim=1, stable=True)
    place = torch.arange(alike.shape[1], device=alike.device).expand_as(frame)
    first = torch.searchsorted(grouped, grouped)  # where a frame's tokens begin
    beyond = (place - first) >= wanted.gather(1, grouped)
    # From the least alike on: what its frame keeps comes before all that it does not.
    rank = torch.zeros_like(place).scatter(1, by_frame, place.shape[1] * beyond.long()) + place
    return order.gather(1, rank.argsort(dim=1)[:, :k])


def _gaussians(x: Tensor, center: Tensor) -> Tensor:
    distance = (x - center).square().sum(2)
    return torch.stack([(distance / (-2 * width)).exp() for width in WIDTHS]).sum(0)


def _counts(frame: Tensor, frames: int) -> Tensor:
    return torch.zeros(len(frame), frames, dtype=torch.long, device=frame.device).scatter_add(
        1, frame, torch.ones_like(frame)
    )


@register
@dataclass(frozen=True)
class VidCom2(ItemTokens):
    """Keep the projected tokens that stand out of their video and their frame."""

    name = "vidcom2"
    title = "VidCom2"
    group = "before_llm"
    paper = "arXiv 2505.14454"
    helps = "Videos of which some frames show what no other does: these keep more; no attention and no question is read."

    keep: int | float = 0.25
    channels: Annotated[float, In(0, 1)] = 0.5
    """Share of the channels in which tokens are compared: those that vary least over the video, at least one."""
    temperature: Annotated[float, AtLeast(1e-6)] = 0.01
    """Of the softmax over frames: the lower it is, the more of all the frame that is least like the whole has for itself."""
    positions: Positions = "auto"

    def budget(self) -> Budget:
        """Shares are rounded down."""
        return Budget(self.keep, "floor")

    def wanted(self, item: Item) -> int:
        """One of each frame at least."""
        return min(max(super().wanted(item), item.frames), item.count)

    def workspace(self, shape: Shape) -> int:
        """The tokens as float32, those channels of them that are compared at length 1, means and differences."""
        return super().workspace(shape) + 6 * shape.floats(shape.hidden)

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """What stands out, then raster order."""
        frame = images.ordinal.div(images.rows * images.columns // images.frames, rounding_mode="floor")
        of_video, of_frame = likeness(images.x, frame, images.frames, self.channels)
        share = self.keep if isinstance(self.keep, float) else k / images.count
        wanted = shares(of_video, frame, images.frames, share, self.temperature)
        return retained(of_video + of_frame, frame, wanted, k).sort(dim=1).values
