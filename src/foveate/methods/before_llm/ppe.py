"""PPE: a merged visual token carries the positions of several of its members at once.

Rotary embeddings turn each frequency on its own, so the frequencies of every axis are cut into K equal parts, and part k of
a merged token turns by the position of its k-th member. Tokens are merged by DPC-KNN, as in Chat-UniVi, the paper's host.

Paper: "PPE: Positional Preservation Embedding for Token Compression in Multimodal Large Language Models", arXiv 2510.22936.
Follows the released code where the paper differs: members are listed by index, the last first (``order="distance"``: the
closest to the cluster's centre first); a repeated merge takes the whole table of one member. Differs from it: ties between
densities are broken by index, not by random noise; a K that does not divide the axes is refused. Reconstructed: the cascade
on images (the release has it on videos) and K for other head sizes. Temporal merging of video frames is not implemented.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Keep, Layers
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.cluster import density_peaks, members
from foveate.ops.means import means


def cluster_tokens(x: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """Centres ``[I, count]`` and clusters ``[I, N]`` of tokens ``[I, N, D]``, with fewer neighbours for few clusters."""
    return density_peaks(x, count, neighbours if neighbours <= count else min(3, max(count // 2, 1)))


def by_distance(x: Tensor, centre: Tensor) -> Tensor:
    """Tokens ``[I, N]`` of ``x`` ``[I, N, D]``, those closest to their ``centre`` ``[I, N]`` first."""
    centres = x.gather(1, centre[..., None].expand_as(x))
    return (x.float() - centres.float()).square().sum(2).argsort(dim=1, stable=True)


def position_table(positions: Tensor, member: Tensor) -> Tensor:
    """Positions of merged tokens, K rows for each axis.

    Args:
        positions: ``[A * K, I, N]`` of the tokens, row ``a * K + k`` for part k of axis a.
        member: ``[I, M, K]`` the member of each slot; ``[I, M, 1]`` for the whole table of one member.

    Returns:
        ``[A * K, I, M]``.
    """
    slot = member.permute(2, 0, 1)
    return positions.gather(2, slot.repeat(len(positions) // len(slot), 1, 1))


@register
@dataclass(frozen=True)
class PPE(Tokens):
    """Merge the tokens of each image by DPC-KNN and give every merged token the positions of K of its members."""

    name = "ppe"
    title = "PPE"
    group = "before_llm"
    paper = "arXiv 2510.22936"
    helps = "Where merging costs the sense of place (reading, counting, layouts): positions of merged members live on."
    trained = (
        "the main results of its paper are of models that were fine-tuned with it; the paper reports larger losses without"
    )
    needs = ("projected tokens", "rotary positions by part of each axis")
    identity_at = {"keep": 1.0}  # noqa: RUF012
    moves = True

    keep: Annotated[int | float, Keep()] = 0.45
    """Tokens that are left of those alive, in each grid (a picture, or one tile or view of it), each frame of a video on
    its own, at every site.
    """
    capacity: Annotated[int, AtLeast(1)] | None = None
    """K, positions of a merged token; None = the most that divide every axis, up to 8 for three axes (32 for one)."""
    neighbours: Annotated[int, AtLeast(1)] = 5
    """Nearest tokens by which the density around a token is measured; fewer where few clusters are asked for."""
    order: Literal["index", "distance"] = "index"
    """Which K members hand on their positions: the last by index, or those closest to the centre (``"distance"``)."""
    arrange: Literal["score", "raster"] = "score"
    """Order in which an image's merged tokens stand: the released one, or that of the cluster centres in the image."""
    layers: Annotated[tuple[int, ...], Layers(0)] = ()
    """Decoder layers before which to merge, instead of once before the language model (11, 23, 35 of 36 in the paper)."""

    def budget(self) -> Budget:
        """Clusters of each image."""
        return Budget(self.keep, "ceil")

    def slots(self, traits: Traits) -> int:
        """K on such a model."""
        if self.capacity is not None:
            return self.capacity
        common = math.gcd(*traits.rotary_axes)
        most = 8 if len(traits.rotary_axes) > 1 else 32
        return next(k for k in range(most, 0, -1) if common % k == 0)

    def check(self, traits: Traits) -> str | None:
        """K must divide every axis; the layers must exist."""
        if not traits.rotary_axes:
            return f"needs rotary positions, which {traits.family} has not"
        slots = self.slots(traits)
        if any(axis % slots for axis in traits.rotary_axes):
            divisors = math.gcd(*traits.rotary_axes)
            return f"capacity={slots}: must divide {divisors}, as the rotary axes have {traits.rotary_axes} frequencies"
        if self.layers and self.layers[-1] >= traits.decoder_layers:
            return f"layers={self.layers}: must be in 0..{traits.decoder_layers - 1}"
        return None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model, or before some of its layers."""
        return tuple(Site("decoder", layer) for layer in self.layers) or (Site("sequence"),)

    def workspace(self, shape: Shape) -> int:
        """Distances of all tokens, and the positions of each token's members."""
        positions = 4 * (self.capacity or 32) * shape.ids
        return shape.edits + 4 * shape.pairs + 5 * shape.floats(shape.hidden) + positions

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Cluster the images by size, all of one size at once."""
        alive, groups = layout.alive, dict[tuple[int, int], list[tuple[int, int]]]()
        for b, items in enumerate(layout.items):
            for j, item in enumerate(items):
                frames = item.frames if alive[b][j] % item.frames == 0 else 1
                groups.setdefault((alive[b][j] // frames, frames), []).append((b, j))
        groups = {(n, frames): entries for (n, frames), entries in groups.items() if self.budget().of(n) < n}
        if not groups:
            return None

        slots, table = self._table(layout, state)
        itself = torch.arange(x.shape[1], device=x.device).expand(layout.shape)
        owner = itself.masked_fill(~layout.valid, -1)
        place, left = owner.clone(), [list(counts) for counts in alive]
        for (tokens, frames), entries in groups.items():
            count = self.budget().of(tokens)
            sample = upload([b for b, _ in entries], x.device).repeat_interleave(frames)[:, None]
            where = layout.where(entries).reshape(-1, tokens)  # the frames of a video follow each other
            with about(sample[:, 0], where, layout.shape):
                centres, cluster = cluster_tokens(x[sample, where], count, self.neighbours)
            if self.order == "index":
                order = torch.arange(tokens - 1, -1, -1, device=x.device).expand_as(where)
            else:
                order = by_distance(x[sample, where], centres.gather(1, cluster))
            centre_rows = where.gather(1, centres)
            owner[sample, where] = centre_rows.gather(1, cluster)
            place[sample, where] = -1
            place[sample, centre_rows] = where[:, :count] if self.arrange == "score" else centre_rows
            table[:, sample, centre_rows] = position_table(table[:, sample, where], members(cluster, order, count, slots))
            for b, j in entries:
                left[b][j] = count * frames

        visual = tuple(map(sum, left))
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, visual))
        reduction = means(owner, place, live)
        positions = reduction.take(table.permute(1, 2, 0)).masked_fill(~reduction.valid[..., None], 0)
        by_item = tuple(map(tuple, left))
        return Edit(reduction, positions=positions.permute(2, 0, 1), live=live, visual=visual, by_item=by_item)

    def _table(self, layout: Layout, state: State) -> tuple[int, Tensor]:
        """Members to list for a merged token, and positions ``[A * K, B, N]`` before the merge."""
        traits: Traits = state.get("session", "traits")
        axes, slots = len(traits.rotary_axes), self.slots(traits)
        if layout.positions.shape[0] == axes * slots:  # merged before: a member brings its whole table
            return 1, layout.positions.clone()
        # Some families put a row of text positions in front of the axes.
        return slots, layout.positions[-axes:].repeat_interleave(slots, dim=0)
