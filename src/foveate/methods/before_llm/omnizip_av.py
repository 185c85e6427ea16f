"""OmniZip (audio and video): the more of its sound counts, the more of a stretch of video stays.

Paper: "OmniZip: Audio-Guided Dynamic Token Compression for Fast Omnimodal Large Language Models", arXiv 2511.14582. As the
published code (its newer core) cuts video: sound is kept where it is important and at evenly spread anchors; the share that
a window keeps of its sound says how much of its video is dropped, within a budget; in every other frame of a window the
peaks of density stay, in the frames between what changed most. Original positions. The importance of sound is side data:
``audio`` ``[n]`` of each video, a number for each 40 ms or so, such as the attention that it gets in the last layer of an
audio encoder, or its loudness; the track lasts as long as the video. Differs: rows of sound in the prompt (Qwen2.5-Omni)
all stay, none are dropped or merged into anchors. Reconstructed: windows are so many steps of the video's grid (2
are the paper's 4 sampled frames), with as many values of sound each. A video without sound stays whole.

How much sound each window keeps has to come to the host once for each forward: the prompt's length depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.roles import Item
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.select import top_k, top_of_groups

AUDIO = Side("audio", needed=False)
NEIGHBOURS = 5
"""Of the density of a frame's tokens."""


def kept_audio(importance: Tensor, discard: float, context: float) -> Tensor:
    """Mask ``[n]`` of the sound that counts: the most important, and anchors spread over the rest.

    Args:
        importance: ``[n]``.
        discard: share that is not among the most important.
        context: anchors, as a share of n.
    """
    count = len(importance)
    kept = torch.zeros_like(importance, dtype=torch.bool)
    kept[top_k(importance, round((1 - discard) * count))] = True
    left = count - round((1 - discard) * count)
    anchors = min(round(context * count), left)
    if anchors:
        nth = (~kept).long().cumsum(0) - 1
        step = max(1, left // anchors)
        kept = kept | (~kept & (nth % step == 0) & (nth < step * anchors))
    return kept


def drop_rates(
    retention: Sequence[float], sizes: Sequence[int], discard: float, low: float, high: float, unguided: int = 0
) -> list[float]:
    """Share of its video tokens that each window loses.

    Args:
        retention: share of its sound that each window keeps.
        sizes: its video tokens.
        discard: share of all video tokens that is to go; three windows or more are brought near to it, the one that loses
            most and the one that loses least (the first of equals) aside.
        low, high: least and largest share of a window.
        unguided: video tokens of windows without sound, which lose ``discard``.
    """

    def clip(rate: float) -> float:
        return min(max(rate, low), high)

    rates = [clip(high - (high - low) * share) for share in retention]
    target = discard * (sum(sizes) + unguided) - discard * unguided
    least, most = rates.index(min(rates)), rates.index(max(rates))
    others = [window for window in range(len(rates)) if window not in (least, most)]

    def gap() -> float:
        return target - sum(rate * size for rate, size in zip(rates, sizes))

    if len(rates) < 3 or abs(gap()) <= 1e-3 or not others:
        return rates
    inside = sum(rates[window] * sizes[window] for window in others)
    factor = (gap() + inside) / inside
    for window in others:
        rates[window] = clip(rates[window] * factor)
    more = gap() / sum(sizes[window] for window in others)
    for window in others:
        rates[window] = clip(rates[window] + more)
    return rates


def peaks(frames: Tensor, neighbours: int = NEIGHBOURS) -> Tensor:
    """``[F, P]`` density of each token of ``frames`` ``[F, P, D]`` times its cosine distance to the nearest denser one.

    A token is dense that lies near to its ``neighbours`` nearest others.
    """
    unit = normalize(frames.float(), dim=-1)
    tokens = unit.shape[1]
    apart = 1 - unit @ unit.mT
    itself = torch.eye(tokens, dtype=torch.bool, device=frames.device)
    near = apart.masked_fill(itself, float("inf")).topk(min(neighbours, max(tokens - 1, 1)), dim=2, largest=False).values
    density = (-near.mean(2)).exp()
    denser = density[:, None, :] > density[:, :, None]
    gap = apart.masked_fill(~denser, float("inf")).amin(2)
    farthest = apart.masked_fill(itself, float("-inf")).amax(2)
    return torch.where(gap.isinf(), farthest, gap) * density


def interleaved(video: Tensor, starts: Sequence[int]) -> Tensor:
    """What the tokens of a video are ranked by: `peaks` in the frames at even places of a window, change in the others.

    Args:
        video: ``[T, P, D]``.
        starts: first frame of each window.

    Returns:
        ``[T, P]``; change is minus the cosine to the same place in the frame before.
    """
    first = torch.tensor([max(start for start in starts if start <= frame) for frame in range(len(video))])
    even = ((torch.arange(len(video)) - first) % 2 == 0).nonzero()[:, 0].to(video.device)
    unit = normalize(video.float(), dim=-1)
    changed = -(unit * unit.roll(1, 0)).sum(-1)
    return changed.index_copy(0, even, peaks(video[even]))


@register
@dataclass(frozen=True)
class OmniZipAV(Tokens):
    """Drop video tokens by what the sound of the same time is worth."""

    name = "omnizip_av"
    title = "OmniZip (audio-video)"
    group = "before_llm"
    paper = "arXiv 2511.14582"
    helps = "Videos whose sound says when something happens."
    needs = ("projected tokens", "side data: audio")
    identity_at = {"low": 0.0, "high": 0.0, "video": 0.0}  # noqa: RUF012
    needs_grid = True

    audio: Annotated[float, In(0, 1)] = 0.3
    """Share of the sound that does not count (the most important stays, and the anchors)."""
    video: Annotated[float, In(0, 1)] = 0.6
    """Share of the video tokens that is dropped, as nearly as ``low`` and ``high`` allow."""
    low: Annotated[float, In(0, 1)] = 0.35
    """Share that a window loses whose sound all counts."""
    high: Annotated[float, In(0, 1)] = 0.75
    """Share that a window loses whose sound does not count at all."""
    context: Annotated[float, In(0, 1)] = 0.05
    """Anchors, as a share of the sound."""
    steps: Annotated[int, AtLeast(1)] = 2
    """Steps of the video's grid (of one or, in the Qwen families, two frames each) that make a window."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.low <= self.high, "low", f"must be at most high={self.high!r}")

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The sound."""
        return (AUDIO,)

    def workspace(self, shape: Shape) -> int:
        """Frames at length 1, and distances within each of them."""
        return shape.edits + 4 * shape.floats(shape.hidden) + 4 * shape.pairs

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the tokens of each video with sound, and keep in each frame what its window may keep."""
        every = [(b, j) for b, items in enumerate(layout.items) for j in range(len(items))]
        heard = [
            (of, sound) for of, sound in zip(every, seen[AUDIO].of(every) if AUDIO in seen else ()) if sound is not None
        ]
        if not heard:
            return None
        shares = [self._retention(sound, layout.items[b][j]) for (b, j), sound in heard]
        retention = iter(torch.cat(shares).tolist())  # the one wait
        kept = layout.item >= 0
        left = [[item.count for item in items] for items in layout.items]
        for ((b, j), _), share in zip(heard, shares):
            item, where = layout.items[b][j], layout.where([(b, j)])
            frames, tokens = item.frames, item.count // item.frames
            starts = self._starts(item)
            sizes = [(end - start) * tokens for start, end in pairwise([*starts, frames])]
            rates = drop_rates([next(retention) for _ in share], sizes, self.video, self.low, self.high)
            counts = [min(int(tokens * (1 - rate)), tokens) for rate in rates]
            by_frame = [counts[frame // self.steps] for frame in range(frames)]
            with about(torch.full((1,), b, device=x.device), where, layout.shape):
                scores = interleaved(x[b, where[0]].reshape(frames, tokens, -1), starts).reshape(1, -1)
                frame = torch.arange(frames, device=x.device).repeat_interleave(tokens)[None]
                kept[b, where[0]] = top_of_groups(scores, frame, [by_frame])[0]
            left[b][j] = sum(by_frame)
        by_item = tuple(map(tuple, left))
        visual = tuple(map(sum, left))
        return None if visual == layout.visual else layout.keeping(kept, visual, by_item=by_item)

    def _starts(self, item: Item) -> list[int]:
        return list(range(0, item.frames, self.steps))

    def _retention(self, sound: Any, item: Item) -> Tensor:
        """``[windows]`` share of its sound that each window keeps."""
        windows = len(self._starts(item))
        if not isinstance(sound, Tensor) or sound.ndim != 1 or len(sound) < windows:
            shape = tuple(sound.shape) if isinstance(sound, Tensor) else type(sound).__name__
            raise FoveateError(
                f"omnizip_av: audio={shape}: must be [n] of each video, a number for each of its {windows} windows at least"
            )
        kept = kept_audio(sound.float(), self.audio, self.context).double()
        ends = [len(sound) * window // windows for window in range(windows + 1)]
        return torch.stack([kept[start:end].mean() for start, end in pairwise(ends)])
