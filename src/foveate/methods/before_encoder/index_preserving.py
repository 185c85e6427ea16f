"""Index-preserving pruning: a tiny classifier drops background cells of the picture before the encoder sees them.

What it calls foreground is dilated by a 3 x 3 window, and every cell that stays keeps its original place in the rotary
positions of encoder and language model. Paper: "Index-Preserving Lightweight Token Pruning for Efficient Document
Understanding in Vision-Language Models", arXiv 2509.06415. Follows the released code, which came without weights: text
after an image follows its largest kept position; ``text_after="keep"`` leaves it where it was. Reconstructed: an image that
is all background keeps its most likely cell; the size of cells is the model's. ``foveate calibrate index_preserving`` trains
a classifier on pictures of which is known where they show what counts, without the paper's augmentation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Offline, Tokens
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, In, Odd
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import FLOAT, Shape
from foveate.core.signal import Numbers, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.select import top_k

MEASURED = 10
"""At calibration, every tenth picture is not learnt from: the classifier is measured on it."""


def cell_logits(cells: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
    """How much the classifier takes each cell for foreground.

    Args:
        cells: ``[..., P]`` normalised pixels, P = channels * rows * columns, channels first.
        weights: ``norm_weight`` and ``norm_bias`` ``[P]``, ``hidden_weight`` ``[F, P]``, ``hidden_bias`` ``[F]``,
            ``head_weight`` ``[1, F]``, ``head_bias`` ``[1]``.

    Returns:
        ``[...]`` logits, float32.
    """
    normed = functional.layer_norm(cells.float(), cells.shape[-1:], weights["norm_weight"], weights["norm_bias"])
    hidden = functional.gelu(functional.linear(normed, weights["hidden_weight"], weights["hidden_bias"]))
    return functional.linear(hidden, weights["head_weight"], weights["head_bias"])[..., 0]


def dilated(foreground: Tensor, layout: Layout, kernel: int = 3) -> Tensor:
    """Rows within reach of a foreground row of their own image and frame, ``[I, N]`` bool.

    Args:
        foreground: ``[I, N]`` bool.
        layout: of one image a sample.
        kernel: width of the window in cells, odd.
    """
    grids = [images[0] for images in layout.items]
    height = upload([grid.rows // grid.frames for grid in grids], foreground.device)[:, None]
    cell = layout.yx.clamp(min=0)
    gap = kernel // 2
    y, x = cell[..., 0], cell[..., 1]
    y = y + y // height * gap  # frames lie one below the other
    rows, columns = max(grid.rows + (grid.frames - 1) * gap for grid in grids), max(grid.columns for grid in grids)
    place = y * columns + x
    here = (foreground & (layout.ordinal >= 0)).float()
    canvas = here.new_zeros(len(grids), rows * columns).scatter_reduce(1, place, here, "amax")
    grown = functional.max_pool2d(canvas.reshape(-1, 1, rows, columns), kernel, stride=1, padding=gap).flatten(1)
    return (grown.gather(1, place) > 0) & (layout.ordinal >= 0)


def train(
    cells: Tensor,
    labels: Tensor,
    *,
    hidden: int = 256,
    steps: int = 4000,
    seed: int = 0,
    rate: float = 1e-4,
    batch: int = 256,
    advance: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """Fit a classifier: AdamW on binary cross-entropy, half of every batch foreground; the best of the held-out tenth stays.

    Args:
        cells: ``[N, C, h, w]`` normalised pixels.
        labels: ``[N]`` bool, whether a cell is foreground; both kinds must occur.
        hidden: features.
        steps: batches.
        seed: of weights and batches.
        rate: learning rate.
        batch: cells a batch.
        advance: called after each step.

    Returns:
        The weights of `cell_logits`.

    Raises:
        FoveateError: if all cells are of one kind.
    """
    generator = torch.Generator().manual_seed(seed)
    flat, labels = cells.flatten(1).float(), labels.bool()
    order = torch.randperm(len(flat), generator=generator)
    held_out, rest = order[: len(order) // 10], order[len(order) // 10 :]
    kinds = [rest[labels[rest]], rest[~labels[rest]]]
    if not all(map(len, kinds)):
        raise FoveateError(
            "index_preserving: is to learn from pictures that show what counts in some cells, not in all or none"
        )
    pixels = flat.shape[1]
    weights = {
        "norm_weight": torch.ones(pixels),
        "norm_bias": torch.zeros(pixels),
        "hidden_weight": (torch.rand(hidden, pixels, generator=generator) * 2 - 1) / pixels**0.5,
        "hidden_bias": torch.zeros(hidden),
        "head_weight": (torch.rand(1, hidden, generator=generator) * 2 - 1) / hidden**0.5,
        "head_bias": torch.zeros(1),
    }
    parameters = [weight.requires_grad_() for weight in weights.values()]
    optimiser = torch.optim.AdamW(parameters, rate)
    best, accuracy = dict[str, Tensor](), -1.0
    for step in range(1, steps + 1):
        drawn = [kind[torch.randint(len(kind), (batch // 2,), generator=generator)] for kind in kinds]
        chosen = torch.cat(drawn)
        loss = functional.binary_cross_entropy_with_logits(cell_logits(flat[chosen], weights), labels[chosen].float())
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 5.0)
        optimiser.step()
        advance()
        if step % 200 == 0 or step == steps:
            with torch.no_grad():
                right = ((cell_logits(flat[held_out], weights) > 0) == labels[held_out]).float().mean().item()
            if right > accuracy:
                best, accuracy = {name: weight.detach().clone() for name, weight in weights.items()}, right
    return best


@register
@dataclass(frozen=True)
class IndexPreserving(Tokens, Offline):
    """Encode foreground cells only, each at its original place. Costs one host sync: how many there are."""

    name = "index_preserving"
    title = "Index-Preserving Pruning"
    group = "before_encoder"
    paper = "arXiv 2509.06415"
    helps = (
        "Documents and screens, of which much is empty: background is not even encoded, so the encoder's time falls "
        "with the rest."
    )
    needs = ("a trained cell classifier",)
    identity_at = {"threshold": -1e9}  # noqa: RUF012
    marked = True

    threshold: Annotated[float, In(-1e9, 1e9)] = 0.0
    """On the classifier's logit: cells above it are foreground. 0 = as likely as not; higher keeps less."""
    kernel: Annotated[int, Odd()] = 3
    """Width of the dilation in cells; 1 = none."""
    text_after: Literal["follow", "keep"] = "follow"
    """Positions of text behind an image: ``"follow"`` its largest kept one, ``"keep"`` their own."""
    steps: Annotated[int, AtLeast(1)] = 4000
    """At calibration: batches that the classifier is trained on."""

    def check(self, traits: Traits) -> str | None:
        """Needs the encoder's input, and a classifier of its cells."""
        reason = traits.refuse_sites("patches")
        if reason is not None:
            return f"{reason}; use a method that acts behind the encoder, such as uniform"
        reason = self.refuse_numbers(traits, "needs a classifier of this model's cells")
        numbers = self.numbers(traits)
        if reason is None and numbers is not None and tuple(numbers["cell"]) != traits.cell:
            return f"its classifier reads cells {tuple(numbers['cell'])}, this model has {traits.cell}; calibrate it again"
        return reason

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the encoder."""
        return (Site("patches"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The classifier."""
        return (Numbers(self.name),)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How much counts as background."""
        return {"threshold": Range(-4.0, 4.0), "kernel": (1, 3, 5)}

    def workspace(self, shape: Shape) -> int:
        """Copies of the pixels, and the classifier's features."""
        cells = shape.images * shape.image_rows
        return shape.edits + 6 * cells * (shape.cell + 256) * FLOAT

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """The classifier, and shares on pictures that it did not learn from, at this threshold and dilation.

        ``accuracy`` on cells, ``foreground`` among them, cells ``kept`` once dilated, the ``recall`` of foreground by these.
        """
        cells, labels, measured, pictures = list[Tensor](), list[Tensor](), list[tuple[Tensor, Tensor, Layout, Tensor]](), 0
        for x, shown, layout in call.cells():
            held_out = (torch.arange(pictures, pictures + len(x)) + 1) % MEASURED == 0
            pictures += len(x)
            learnt = layout.valid & ~held_out[:, None]
            cells.append(x[learnt])
            labels.append(shown[learnt])
            measured.append((x[held_out], shown, layout, held_out))
        if pictures < MEASURED:
            raise FoveateError(f"{self.name}: calibration needs {MEASURED} pictures or more, and there are {pictures}")
        call.begin("training", self.steps)
        weights = train(torch.cat(cells), torch.cat(labels), steps=self.steps, advance=call.advance)
        shares = self._measured(measured, weights)
        return {"cell": list(call.traits.cell or ()), **shares, **weights}

    def _measured(
        self, pictures: Sequence[tuple[Tensor, Tensor, Layout, Tensor]], weights: Mapping[str, Tensor]
    ) -> dict[str, float]:
        """Shares on the held-out pictures of each batch: their cells, what all of it show, its layout, which they are."""
        parts = []
        for x, shown, layout, held_out in pictures:
            found = torch.zeros_like(shown)
            found[held_out] = cell_logits(x, weights) > self.threshold
            kept, there = dilated(found, layout, self.kernel), layout.valid & held_out[:, None]
            parts.append(torch.stack([found[there], shown[there], kept[there]]))
        found, shown, kept = torch.cat(parts, dim=1)
        shares = {"accuracy": found == shown, "foreground": shown, "kept": kept, "recall": kept[shown]}
        return {name: share.float().mean().item() for name, share in shares.items() if len(share)}

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Classify, dilate, keep at least one cell of each image."""
        visual = layout.rows(*VISUAL)
        logits = cell_logits(x, seen[Numbers(self.name)]).masked_fill(~visual, float("-inf"))
        kept = dilated(logits > self.threshold, layout, self.kernel)
        likeliest = torch.zeros_like(kept).scatter(1, top_k(logits, 1), True)
        kept = torch.where(kept.any(1, keepdim=True), kept, likeliest) & visual
        counts = tuple(kept.sum(1).tolist())
        if counts == layout.visual:
            return None
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, counts))
        reduction = Reduction.keeping(kept | (layout.valid & ~visual), live)
        return Edit(reduction, positions="anchor", text_after=self.text_after, live=live, visual=counts)
