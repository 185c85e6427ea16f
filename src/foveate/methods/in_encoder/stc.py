"""STC: a frame takes most of its way through the encoder from an earlier one, and its most novel tokens go on to the LLM.

Paper: "Accelerating Streaming Video Large Language Models via Hierarchical Token Compression", arXiv 2512.00891. Two parts.
The *cacher*: every ``interval``-th chunk of frames runs whole. In the chunks between, each block of the encoder makes keys
of all rows, and queries, values and MLP of the ``update`` share whose keys have the lowest cosine with those of the last
whole frame; the others take what that frame's attention and MLP added at their places. The *pruner*: of each frame ``keep``
tokens go on, those farthest by cosine from the mean of the frames before it and from the frame's own mean. No question is
read, and no later frame.

Frames are those of a video, or, while a stream is open (`Session.streaming`), all that it shows. A picture alone runs whole,
and only its own mean is there to be far from.

``variant="released"`` prunes as the published code does: by Gaussian kernels around the frame's mean and that of all chunks
so far, this one included, on the half of the channels that vary least. Which these are, and in which order, is found anew
in each chunk, so that the history adds up different ones. Reconstructed: ``alpha`` and ``window`` of the paper's form; the
first frame has no history, so that its own mean alone counts; every earlier frame counts as one, whatever chunk it came in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize, pad

from foveate.core.budget import Budget
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.reuse import Reuse
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.select import top_k, top_of_groups

Past = tuple[Tensor, int]
"""Of the frames (chunks) so far: the last of their means ``[E, d]``, or the sum of all ``[1, d]``; and their number."""


def most_changed(keys: Tensor, reference: Tensor, share: float) -> Tensor:
    """Rows ``[F, k]``, ascending, whose ``keys`` ``[F, T, C]`` have the lowest cosine with their ``reference``'s.

    k is ``share`` of T, rounded down, at least one.
    """
    count = min(max(int(keys.shape[1] * share), 1), keys.shape[1])
    return top_k(-cosine_similarity(keys.float(), reference.float(), dim=2), count).sort(dim=1).values


def novelty(z: Tensor, past: Past | None = None, alpha: float = 0.5, window: int | None = None) -> tuple[Tensor, Past]:
    """How far each token is from what was there (the paper's form), and what is past then.

    Args:
        z: ``[L, F, P, d]`` tokens of F frames of L videos.
        past: of the one video, None at its start.
        alpha: weight of the distance from the history; the frame's own mean has the rest.
        window: frames that the history goes back, None = all.

    Returns:
        ``[L, F, P]`` ``alpha * (1 - cos to the history) + (1 - alpha) * (1 - cos to the frame's mean)``; of frames without a
        history the second distance alone.
    """
    means = z.mean(2)
    rows, count = (means[0, :0], 0) if past is None else past
    known = torch.cat([rows.expand(len(z), -1, -1), means], dim=1)
    sums = pad(known.cumsum(1), (0, 0, 1, 0))
    ends = torch.arange(len(rows), known.shape[1], device=z.device)
    begins = torch.zeros_like(ends) if window is None else (ends - window).clamp(min=0)
    # A sum points where the mean does.
    history = 1 - cosine_similarity(z, (sums[:, ends] - sums[:, begins])[:, :, None], dim=3)
    own = 1 - cosine_similarity(z, means[:, :, None], dim=3)
    weight = torch.full((z.shape[1], 1), alpha, device=z.device)
    if count == 0:
        weight[0] = 0.0
    last = sums[0, -1:] if window is None else known[0, -window:]
    return weight * history + (1 - weight) * own, (last, count + z.shape[1])


def gaussian(z: Tensor, anchor: Tensor) -> Tensor:
    """``[...]`` sum over p = -3 .. 1 of ``exp(-|z - anchor|**2 / (2 * 2**p))``, of vectors ``[..., d]``."""
    distance = (z - anchor).square().sum(-1)
    return sum((torch.exp(-distance / 2.0 ** (p + 1)) for p in range(-3, 2)), torch.zeros_like(distance))


def familiarity(z: Tensor, past: Past | None = None, select: bool = True) -> tuple[Tensor, Past]:
    """How close each token is to what was there (the published code's form), and what is past then.

    Args:
        z: ``[L, C, F, P, d]`` tokens of F frames in each of C chunks of L videos.
        past: of the one video, None at its start.
        select: whether to look at the channels that vary least only.

    Returns:
        ``[L, C, F, P]`` the sum of `gaussian` of both means.
    """
    chunks, frames = z.shape[1], z.shape[2]
    z = z.flatten(2, 3)
    if select:
        channels = top_k(-z.var(2), z.shape[3] // 2)  # entries of the history stand in this order, too
        z = z.gather(3, channels[:, :, None].expand(-1, -1, z.shape[2], -1))
    entries = z.mean(2)
    total, count = (torch.zeros_like(entries[0, :1]), 0) if past is None else past
    sums = total + entries.cumsum(1)
    by_frame = normalize(z, dim=3).reshape(*z.shape[:2], frames, -1, z.shape[3])
    score = gaussian(by_frame, by_frame.mean(3, keepdim=True)) + gaussian(by_frame, normalize(sums, dim=2)[:, :, None, None])
    return score, (sums[0, -1:], count + chunks)


@register
@dataclass(frozen=True)
class STC(Reuse, Tokens):
    """Reuse of encoder blocks between frames, and the most novel tokens of each frame."""

    name = "stc"
    title = "STC"
    group = "in_encoder"
    paper = "arXiv 2512.00891"
    helps = (
        "Streams of frames that are like those before them: the encoder has less to do, too, and nothing waits for the end."
    )
    needs = ("an encoder that takes each frame by itself (or interval=1)", "projected tokens")
    identity_at = {"keep": 1.0, "interval": 1}  # noqa: RUF012
    needs_grid = True

    keep: Annotated[int | float, Keep()] = 60
    """Visual tokens that stay of each frame, or of each picture (tile or view of it)."""
    update: Annotated[float, In(0, 1)] = 0.25
    """Share of a frame's rows that run through a block of the encoder, where the frame takes the others from an earlier one.
    """
    interval: Annotated[int, AtLeast(1)] = 2
    """Every so many chunks one runs whole; 1 = all do, so that the pruner is there alone."""
    chunk: Annotated[int, AtLeast(1)] = 1
    """Frames of a chunk."""
    alpha: Annotated[float, In(0, 1)] = 0.5
    """Weight of the distance from earlier frames' mean beside that from the frame's own; paper's form only."""
    window: Annotated[int, AtLeast(1)] | None = None
    """Earlier frames that count, None = all; paper's form only."""
    variant: Literal["paper", "released"] = "paper"
    """Whether tokens are chosen as in the paper or as in the published code."""
    positions: Positions = "auto"
    """Rotary positions of what stays: as if the prompt had been short (``"contiguous"``), the original ones (``"anchor"``),
    as if the grid had been smaller (``"rank"``), or contiguous where positions are one row, else original (``"auto"``).
    """

    def check(self, traits: Traits) -> str | None:
        """The cacher needs frames in a batch; contiguous positions have no meaning under M-RoPE."""
        if self.interval > 1 and not traits.reuses:
            return (
                f"interval={self.interval}: needs an encoder that takes each frame by itself and can be taken apart, which "
                f"{traits.family} does not offer; use interval=1, the pruner alone"
            )
        return traits.refuse_positions(self.positions)

    def reused(self, traits: Traits) -> tuple[int, ...]:
        """All that the projector is fed by."""
        idle = self.interval == 1 or self.update == 1 or traits.feature_layer is None
        return () if idle else tuple(range((traits.feature_layer or 0) + 1))

    def reference(self, frame: int) -> int:
        """The last frame of the last chunk that ran whole."""
        chunk = frame // self.chunk
        whole = chunk - chunk % self.interval
        return frame if chunk == whole else (whole + 1) * self.chunk - 1

    def stale(self, layer: int, keys: Tensor, reference: Tensor) -> Tensor:
        """Those whose keys changed most."""
        return most_changed(keys, reference, self.update)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Behind the projector."""
        return (Site("projected"),)

    def workspace(self, shape: Shape) -> int:
        """References, and what is taken from them; tokens at length 1, and their distances from both means."""
        return shape.edits + 12 * shape.features + 6 * shape.floats(shape.hidden)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Keep the most novel tokens of each frame, early ones first among equals."""
        item = layout.items[0][0]  # one grid for all
        frames, tokens = item.frames, item.count // item.frames
        k = Budget(self.keep).of(tokens)
        if k == tokens:
            return None
        memory, size = state.memory, (item.rows // frames, item.columns)
        lanes = len(x) if memory is None else 1
        z = x.float().reshape(lanes, -1, tokens, x.shape[2])
        score, past = self._novelty(z, None if memory is None else memory.get(self, size))
        if memory is not None:
            memory.put(self, size, (past[0].detach().clone(), past[1]))
        frame = torch.arange(item.count, device=x.device).div(tokens, rounding_mode="floor").expand(layout.shape)
        chosen = top_of_groups(score.reshape(layout.shape), frame, [[k] * frames] * len(x))
        counts = (k * frames,) * len(x)
        return layout.keeping(chosen, counts, self.positions, by_item=tuple((count,) for count in counts))

    def _novelty(self, z: Tensor, past: Past | None) -> tuple[Tensor, Past]:
        if self.variant == "paper":
            return novelty(z, past, self.alpha, self.window)
        # What is left over at the end of a call is a chunk of its own.
        whole = z.shape[1] - z.shape[1] % self.chunk
        scores = []
        for part, length in ((z[:, :whole], self.chunk), (z[:, whole:], z.shape[1] - whole)):
            if part.shape[1]:
                score, past = familiarity(part.reshape(len(z), -1, length, *z.shape[2:]), past)
                scores.append(-score.flatten(1, 2))
        assert past is not None
        return torch.cat(scores, dim=1), past
