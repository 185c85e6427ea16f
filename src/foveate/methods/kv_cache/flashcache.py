"""FlashCache: keep the cached entries that differ most from a smoothed copy of the sequence, more in layers that are rough.

Paper: "Revisiting Multimodal KV Cache Compression: A Frequency-Domain-Guided Outlier-KV-Aware Approach", arXiv 2511.16786.
No attention is looked at: the low frequencies of a cosine transform (DCT-II) of keys and values along the prompt make the
copy. No code is public: everything follows notes about the paper. Reconstructed: one set of entries for all heads, as
each channel is filtered alone and all count alike; keys are as the cache holds them, rotated; what a layer has no entries
for goes to the others in the same proportion; the last entry of the prompt always stays, within the budget, and so does a
``recent`` window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Seen
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.methods.kv_cache.entries import Evictable, evictable, kept, last_entries
from foveate.ops.dct import low_pass
from foveate.ops.share import dealt


def outliers(states: Tensor, rows: Tensor, counts: Sequence[int], gamma: float) -> tuple[Tensor, Tensor]:
    """How far each row lies from what the low frequencies make of it, and how much of the energy the others hold.

    Args:
        states: ``[B, H, n, d]`` keys or values.
        rows: ``[B, n]`` bool: the rows that are compared.
        counts: how many they are, of each sample.
        gamma: share of the frequencies that are low, the mean always.

    Returns:
        ``[B, n]`` mean squared deviation over channels, 0 at other rows, and ``[B]`` share of energy; float32.
    """
    x = states.transpose(1, 2).flatten(2).float()
    smooth = low_pass(x, rows, counts, [int(gamma * count) for count in counts])
    deviation = (x - smooth).square_().mean(-1).masked_fill(~rows, 0)
    # Lengths are kept by the transform: what is left of the rows is what is left of the spectrum.
    energy = x.square().mean(-1).masked_fill(~rows, 0).sum(1)
    return deviation, deviation.sum(1) / energy.clamp(min=torch.finfo(energy.dtype).tiny)


@register
@dataclass(frozen=True)
class FlashCache(Cache):
    """Keep a share of the entries of all layers, those that differ from their surroundings."""

    name = "flashcache"
    title = "FlashCache"
    group = "kv_cache"
    paper = "arXiv 2511.16786"
    helps = "Long prompts of several pictures or a video, where attention is dear to look at: keys and values alone decide."
    needs = ("cache ownership",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.2
    """Share of a layer's entries that may go, or how many of them, that stay: the mean over layers."""
    gamma: Annotated[float, In(0, 1)] = 0.2
    """Share of the frequencies that make the smoothed copy; the mean is always part of it."""
    tokens: Evictable = "all"
    """Entries that may go, and that are filtered as one sequence: of the whole prompt, or only those of its pictures
    (``"visual"``).
    """
    recent: Annotated[int, AtLeast(0)] = 0
    """Last entries of the prompt that stay whatever they are, as far as the budget goes; one does in any case."""

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How smooth the copy is: the paper's best and its neighbours."""
        return {"gamma": (0.1, 0.2, 0.3)}

    def workspace(self, shape: Shape) -> int:
        """Keys or values of one layer in float32, a few times; scores and entries of all; a cache while it shrinks."""
        scores = 3 * (shape.layers + 4) * shape.ids
        return shape.edits + 6 * shape.floats(shape.keys) + scores + 2 * shape.keys

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """``[B, 1 + n]``: the share of energy in high frequencies, of keys and values together, and deviations."""
        rows, counts = evictable(layout, self.tokens)
        if not any(counts):
            return None
        (of_keys, rough_keys), (of_values, rough_values) = (outliers(x, rows, counts, self.gamma) for x in (keys, values))
        return torch.cat([(rough_keys + rough_values)[:, None], ranked(of_keys + of_values)], dim=1)

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """Deal the budget out to all layers. How many entries each keeps of each sample is read from the device once."""
        found: list[Kept | None] = [None] * len(scores)
        scored = {layer: score for layer, score in enumerate(scores) if score is not None}
        there = [evictable(layouts[layer], self.tokens)[1] for layer in scored]
        totals = [Budget(self.keep).across(of_sample) for of_sample in zip(*there)]
        if totals == [sum(of_sample) for of_sample in zip(*there)]:
            return found
        # A window larger than the budget stays as far as the budget goes, its last entries first.
        widths = [min(max(self.recent, 1), max(total // len(scored), 1)) for total in totals]
        windows = {
            layer: last_entries(layouts[layer].valid, widths) & evictable(layouts[layer], self.tokens)[0] for layer in scored
        }
        most = upload(there, layouts[0].valid.device)
        least = torch.stack([window.sum(1) for window in windows.values()])
        rough = torch.stack([score[:, 0] for score in scored.values()])
        counts = dealt((rough * most).T, upload(totals, most.device), most.T, least.T).T.tolist()
        for (layer, score), of_layer in zip(scored.items(), counts):
            ranking = score[:, 1:].masked_fill(windows[layer], float("inf"))
            found[layer] = kept(ranking[:, None], layouts[layer], self.tokens, of_layer)
        return found
