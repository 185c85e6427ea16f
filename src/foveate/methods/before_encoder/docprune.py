"""DocPrune: background and what the question is not about are not encoded; later the last row says what it looks at.

Three stages: patches that show the page's most frequent shade go (BTP), then those that a retriever's embeddings of page and
question call irrelevant (QTP), both before the encoder; inside the language model, once the norm of the prompt's last row is
large enough, visual tokens that this row does not look at (CTP). Paper: "DocPrune: Efficient Document Question Answering via
Background, Question, and Comprehension-aware Token Pruning", arXiv 2604.22281. There is no official code. Not here: BTP in
the retriever. Reconstructed: shades are BT.601 luma in 8 bits of what the encoder gets; a token stays if any of its patches
does; smoothing has a sigma of one patch; the score of CTP, where literal attention cannot be meant, and the input of its
layer as what asks; a page keeps one token at least. The thresholds are of ColPali and Qwen2-VL-7B, that of the norm above
all: other models need their own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In
from foveate.core.ranking import ranked
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import FLOAT, Shape
from foveate.core.signal import Function, Hidden, Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import row_logits
from foveate.ops.select import top_k

Score = Literal["agg_logit", "mean_prob", "kv_group"]
Normalise = Literal["none", "mean", "minmax"]
PAGE, QUESTION = Side("page", needed=False), Side("question", needed=False)
CUT = "docprune"
BY_PAGES = {
    1: {"tau_bg": 0.9, "tau_qst": 0.3, "tau_comp": 65.0, "tau_att": 0.5},
    2: {"tau_bg": 1.0, "tau_qst": 0.3, "tau_comp": 60.0, "tau_att": 0.25},
    4: {"tau_bg": 0.8, "tau_qst": 0.4, "tau_comp": 45.0, "tau_att": 0.075},
}
"""The reader's thresholds, by pages in the prompt (Table B of the supplement)."""


def background_shares(grey: Tensor, there: Tensor, tolerance: float = 1.0) -> Tensor:
    """``[I, N, g]`` share of each patch's pixels that are less than ``tolerance`` from the page's most frequent shade.

    Args:
        grey: ``[I, N, g, p]`` pixels of g patches in each of N cells, whole numbers from 0 to 255.
        there: ``[I, N]`` bool: cells that there are.
        tolerance: strictly more than the distance.
    """
    shades = torch.where(there[..., None, None], grey, 256).flatten(1).long()
    ones = torch.ones_like(shades, dtype=torch.float32)
    counts = torch.zeros(len(grey), 257, device=grey.device).scatter_add_(1, shades, ones)
    ground = counts[:, :256].argmax(1)
    return ((grey - ground[:, None, None, None]).abs() < tolerance).float().mean(3)


def relevance(page: Tensor, question: Tensor, normalise: Normalise = "none") -> Tensor:
    """``[n]`` sum over the ``question``'s embeddings ``[m, d]`` of their cosines with each of the ``page``'s ``[n, d]``.

    ``normalise``: ``"mean"`` divides by m, ``"minmax"`` stretches what is there from 0 to 1.
    """
    unit = functional.normalize(question.float(), dim=1)
    scores = (functional.normalize(page.float(), dim=1) @ unit.mT).sum(1)
    if normalise == "mean":
        return scores / len(question)
    if normalise == "minmax":
        low, high = scores.amin(), scores.amax()
        return (scores - low) / (high - low).clamp(min=torch.finfo(scores.dtype).eps)
    return scores


def smoothed(scores: Tensor, size: tuple[int, int], sigma: float = 1.0) -> Tensor:
    """``scores`` ``[h, w]`` of a grid, resized to one of ``size`` and blurred by a Gaussian, ``sigma`` in its cells."""
    grid = functional.interpolate(scores[None, None], size, mode="bilinear", align_corners=False)
    if sigma == 0:
        return grid[0, 0]
    radius = math.ceil(3 * sigma)
    weights = (-0.5 * (torch.arange(-radius, radius + 1, device=scores.device) / sigma).square()).exp()
    weights = weights / weights.sum()
    wide = functional.pad(grid, (radius,) * 4, mode="replicate")
    return functional.conv2d(functional.conv2d(wide, weights[None, None, None]), weights[None, None, :, None])[0, 0]


def visual_scores(logits: Tensor, visual: Tensor, prompt: Tensor, kv_heads: int, score: Score = "agg_logit") -> Tensor:
    """``[B, N]`` what a row attends to, times the number of its ``visual`` tokens; 0 for all else.

    Args:
        logits: ``[B, H, N]`` of the row over all keys.
        visual: ``[B, N]`` bool.
        prompt: ``[B, N]`` bool: keys that it sees.
        kv_heads: heads of keys, which groups of neighbouring heads share.
        score: softmax over visual tokens of the mean logits of all heads (``"agg_logit"``), or of each group, then the mean
            (``"kv_group"``); or the mean of the heads' own softmax over all that the row sees (``"mean_prob"``).
    """
    groups = {"agg_logit": 1, "kv_group": kv_heads, "mean_prob": logits.shape[1]}[score]
    over = prompt if score == "mean_prob" else visual
    batch, heads, keys = logits.shape
    means = logits.reshape(batch, groups, heads // groups, keys).mean(2)
    means = means.masked_fill(~over[:, None], torch.finfo(logits.dtype).min)
    scores: Tensor = means.softmax(2).mean(1) * visual.sum(1, keepdim=True)
    return scores.masked_fill(~visual, 0)


@register
@dataclass(frozen=True)
class DocPrune(Tokens):
    """Prune pages before the encoder and once in the language model.

    Costs a host sync before the encoder, one behind each layer until all samples were cut, and one for each cut; with
    ``layer`` two altogether.
    """

    name = "docprune"
    title = "DocPrune"
    group = "before_encoder"
    paper = "arXiv 2604.22281"
    helps = (
        "Questions about pages that a retriever found: margins, and with its embeddings all that the question is not about, "
        "are not even encoded."
    )
    needs = (
        "side data: page, question (optional)",
        "decoder hidden states (each layer)",
        "decoder queries and keys (1 layer)",
    )
    identity_at = {"tau_bg": 1.0, "tau_att": 0.0}  # noqa: RUF012

    pages: Literal[1, 2, 4] = 1
    """Pages in a prompt: which of the paper's thresholds stand for those that are None."""
    tau_bg: Annotated[float, In(0, 1)] | None = None
    """Share of background that a patch may have, at most; 1 = background stays."""
    tau_e: Annotated[float, AtLeast(0)] = 1.0
    """Distance from the most frequent shade, of 255, below which a pixel is background."""
    tau_qst: float | None = None
    """Relevance from which patches stay; it adds up over the question's embeddings unless ``normalise`` says otherwise."""
    normalise: Normalise = "none"
    """Relevance as it is, by embedding of the question (``"mean"``), or from 0 to 1 on each page (``"minmax"``)."""
    sigma: Annotated[float, AtLeast(0)] = 1.0
    """Width of the blur of relevance, in patches; 0 = none."""
    tau_comp: Annotated[float, AtLeast(0)] | None = None
    """Norm of the last row behind a decoder layer from which the question counts as understood."""
    layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer, counted from 0, before which tokens go whatever the norm is; None = by ``tau_comp``, or never."""
    tau_att: Annotated[float, AtLeast(0)] | None = None
    """Score from which visual tokens stay then, 1 on average; 0 keeps them all."""
    score: Score = "agg_logit"
    """Softmax over visual tokens of the mean logits of all heads, or of each group that shares keys (``"kv_group"``); or the
    mean of the attention itself (``"mean_prob"``)."""
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    """What the processor subtracted of each channel (``image_mean``; CLIP's and Qwen2-VL's by default)."""
    std: tuple[Annotated[float, AtLeast(1e-6)], ...] = (0.26862954, 0.26130258, 0.27577711)
    """What it divided each channel by (``image_std``)."""

    def fitted(self, traits: Traits) -> Self:
        """The paper's thresholds for so many pages."""
        missing: dict[str, Any] = {name: t for name, t in BY_PAGES[self.pages].items() if getattr(self, name) is None}
        return replace(self, **missing)

    def check(self, traits: Traits) -> str | None:
        """Needs the encoder's input in three colours, and a layer that exists and has attention."""
        reason = traits.refuse_sites("patches")
        if reason is not None or traits.cell is None:
            return f"{reason}; use a method that acts behind the encoder, such as divprune"
        for name in ("mean", "std"):
            if len(getattr(self, name)) != 3 or traits.cell[0] != 3:
                return (
                    f"{name}={getattr(self, name)}: must be one for each of 3 channels, and the model has {traits.cell[0]}"
                )
        return None if self.layer is None else traits.refuse_layers("layer", self.layer, attention=(self.layer - 1,))

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the encoder, and before each decoder layer that has attention in front of it, or ``layer`` alone."""
        if self.fitted(traits).tau_att == 0:
            return (Site("patches"),)
        behind = [layer + 1 for layer in range(traits.decoder_layers - 1) if layer not in traits.recurrent]
        return Site("patches"), *(Site("decoder", layer) for layer in behind if self.layer in (None, layer))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The retriever's embeddings; input, and queries and keys, of the layers in front."""
        before = [site.layer - 1 for site in self.sites(traits) if site.kind == "decoder"]
        asked = (s for layer in before for s in (Hidden(Site("decoder", layer)), Function("query_key", layer)))
        return PAGE, QUESTION, *asked

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How much counts as background, and how much is looked at."""
        return {"tau_bg": Range(0.5, 1.0), "tau_att": Range(0.05, 1.0, log=True), "layer": (self.layer,)}

    def workspace(self, shape: Shape) -> int:
        """Pixels as shades; input, queries and keys of a layer."""
        pixels = 5 * shape.images * shape.image_rows * shape.cell * FLOAT
        return shape.edits + pixels + 3 * shape.hidden + 2 * (shape.queries + shape.keys) + shape.attention(1)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """The first two stages, or the third."""
        if site.kind == "decoder":
            return self._understood(x, site.layer - 1, layout, seen, state)
        return self._worth_encoding(x, layout, seen, state.get("session", "traits"))

    def _worth_encoding(self, x: Tensor, layout: Layout, seen: Seen, traits: Traits) -> Edit | None:
        """Cells of which a patch is neither background nor irrelevant; of each page the least empty one at least."""
        asked = self._asked(layout, seen)
        if self.tau_bg == 1 and all(grid is None for grid in asked):
            return None
        visual, merge = layout.rows(*VISUAL), traits.merge
        shares = background_shares(self._grey(x, traits), visual, self.tau_e)
        wanted = shares <= (self.tau_bg or 0.0)
        for page, scores in enumerate(asked):
            if scores is None:
                continue
            item = layout.items[page][0]
            grid = smoothed(scores, (item.rows * merge, item.columns * merge), self.sigma)
            patches = grid.reshape(item.rows, merge, item.columns, merge).transpose(1, 2)
            relevant = (patches.reshape(item.count, -1) >= (self.tau_qst or 0.0))[layout.ordinal[page].clamp(min=0)]
            wanted[page] &= relevant
        kept = wanted.any(2) & visual
        fullest = top_k((-shares.amin(2)).masked_fill(~visual, float("-inf")), 1)
        kept = torch.where(kept.any(1, keepdim=True), kept, torch.zeros_like(kept).scatter(1, fullest, True) & visual)
        counts = tuple(kept.sum(1).tolist())
        if counts == layout.visual:
            return None
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, counts))
        return Edit(Reduction.keeping(kept | (layout.valid & ~visual), live), live=live, visual=counts)

    def _asked(self, layout: Layout, seen: Seen) -> list[Tensor | None]:
        """The relevance ``[h, w]`` of each page's own grid, None where there are no embeddings."""
        found: list[Tensor | None] = []
        pages = [(row, 0) for row in range(len(layout.items))]
        for items, page, question in zip(layout.items, seen[PAGE].of(pages), seen[QUESTION].of(pages)):
            if page is None and question is None:
                found.append(None)
                continue
            grid = self._embeddings(page, question, items[0].frames)
            found.append(relevance(grid.flatten(0, 1), question, self.normalise).reshape(grid.shape[:2]))
        return found

    def _embeddings(self, page: Tensor | None, question: Tensor | None, frames: int) -> Tensor:
        """The page's embeddings ``[h, w, d]``."""
        if page is None or question is None:
            lacking, other = ("page", "question") if page is None else ("question", "page")
            raise FoveateError(f"{self.name}: side data {lacking!r}: is missing beside {other!r}; give both, or neither")
        if frames > 1:
            raise FoveateError(
                f"{self.name}: side data 'page': is of pictures, not of videos; give a video's frames as pictures"
            )
        side = math.isqrt(page.shape[0])
        if page.ndim == 2 and side * side == page.shape[0]:
            page = page.reshape(side, side, -1)
        if page.ndim != 3 or question.ndim != 2 or page.shape[-1] != question.shape[1]:
            raise FoveateError(
                f"{self.name}: side data 'page' {list(page.shape)} and 'question' {list(question.shape)}: must be [h, w, d] "
                "(or [n, d] of a square) and [m, d]"
            )
        return page

    def _grey(self, x: Tensor, traits: Traits) -> Tensor:
        """``[I, N, g, p]`` shades of the patches in each cell of ``x`` ``[I, N, P]``: whole numbers from 0 to 255."""
        _, rows, columns = traits.cell or (3, 1, 1)
        mean, std = upload(self.mean, x.device), upload(self.std, x.device)
        colours = x.float().reshape(*x.shape[:2], 3, -1) * std[:, None] + mean[:, None]
        luma = upload((0.299, 0.587, 0.114), x.device)
        grey = (colours.mul_(255).round_() * luma[:, None]).sum(2).round_().clamp_(0, 255)
        merge = traits.merge
        patches = grey.reshape(*grey.shape[:2], merge, rows // merge, merge, columns // merge).transpose(3, 4)
        return patches.reshape(*grey.shape[:2], merge**2, -1)

    def _understood(self, x: Tensor, layer: int, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Cut the samples whose last row's norm is large enough for the first time."""
        done: Sequence[bool] = state.get("prefill", CUT, (False,) * len(layout.visual))
        now = [not was and count > 0 for was, count in zip(done, layout.visual)]
        if self.layer is None and any(now):
            last = x.gather(1, layout.last[..., None].expand(-1, -1, x.shape[2]))
            crossed = (last.float().norm(dim=2)[:, 0] >= (self.tau_comp or 0.0)).tolist()
            now = [waits and over for waits, over in zip(now, crossed)]
        if not any(now):
            return None
        state.put("prefill", CUT, tuple(was or cut for was, cut in zip(done, now)))
        before = seen[Hidden(Site("decoder", layer))]
        query, key = seen[Function("query_key", layer)](before, layout)
        asks = query.gather(2, layout.last[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        logits, visual = row_logits(asks, key, key.shape[3] ** -0.5)[:, :, 0], layout.rows(*VISUAL)
        scores = ranked(visual_scores(logits, visual, layout.prompt, key.shape[1], self.score))
        chosen = visual & ((scores >= (self.tau_att or 0.0)) | ~upload(now, x.device)[:, None])
        counts = tuple(chosen.sum(1).tolist())
        return None if counts == layout.visual else layout.keeping(chosen, counts)
