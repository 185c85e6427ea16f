"""MoDES: an expert whose weight counts for little in its layer and for its kind of token does not run.

Paper: "Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic Expert Skipping", arXiv 2511.15690. An
expert is skipped if its share of the weights of all that the router chose for the token, times a factor of its layer and of
the token's modality, is below the modality's threshold. What is left keeps its weight; where nothing is left, the routed
output is zero (shared experts run on). Vision tokens are those of pictures and videos with their line ends. Special tokens
are never skipped: all that the tokenizer calls so, and those that the model's configuration names; where numbers are made
without a tokenizer (``foveate.engine.calibrate`` called without ``special``), the latter alone. Rows of sound, and rows that
other methods put in, are skipped as little. All else is text, tokens that are generated, too.

Numbers (``foveate calibrate modes``): factors by how far the distributions that predict the right answers, and their ends,
move when one layer's experts are skipped for one modality; thresholds by a search along the frontier of all pairs that skip
enough. The published code only simulates what is skipped; here it does not run, for which the host waits for the device once
in each layer. Where code and paper differ, the code's reading is the default: a factor for each layer *and* modality
(``factors="layer"``: one for each layer, as in the paper; special tokens run on, and factors add up to 1 as the code's, on
whose scale the thresholds are, both reconstructed); and tokens whose experts are skipped to find a factor get the experts'
input for their output (``instead="nothing"``: zeros). Factors of a modality that moves nothing are equal (reconstructed).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Experts, Offline
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, In
from foveate.core.recipe import Recipe
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Role
from foveate.core.shape import Shape
from foveate.core.signal import Ids, Numbers, Seen, Signal
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.divergence import divergence

Pair = tuple[float, float]
"""Of text and of vision."""


def skipped(weights: Tensor, text: Tensor, vision: Tensor, factor: Tensor | Pair, threshold: Pair) -> Tensor:
    """Which of the experts that were chosen do not run.

    Args:
        weights: ``[..., K]`` the router's.
        text, vision: ``[...]`` bool: tokens of each kind; those of neither keep all of their experts.
        factor: importance of the layer for each kind, ``[2]``.
        threshold: an expert below it is skipped.

    Returns:
        ``[..., K]`` bool.
    """
    wide = weights.to(torch.promote_types(weights.dtype, torch.float32))
    share = wide / wide.sum(-1, keepdim=True).clamp(min=torch.finfo(wide.dtype).tiny)
    of_text = text[..., None] & (share * factor[0] < threshold[0])
    return of_text | (vision[..., None] & (share * factor[1] < threshold[1]))


def modalities(ids: Tensor, layout: Layout, special: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of text and rows of vision, each ``[B, N]`` bool.

    Args:
        ids: ``[B, N]`` of the rows' tokens.
        layout: of the rows.
        special: ``[S]`` ids that are neither.
    """
    # Not torch.isin, for which the host waits on a GPU.
    marked = (ids[..., None] == special).any(-1)
    return layout.rows(Role.TEXT, Role.ANSWER) & ~marked, layout.rows(*VISUAL, Role.NEWLINE)


def grid(points: int, reach: float) -> list[float]:
    """Thresholds to try, ascending: at even steps of x from 0 to ``reach``, ``2 / (1 + exp(-10 (x - 1)))``."""
    return [2 / (1 + math.exp(-10 * (reach * step / (points - 1) - 1))) for step in range(points)]


def frontier(
    evaluate: Callable[[int, int], Pair], rows: int, columns: int, target: float
) -> tuple[tuple[int, int], dict[tuple[int, int], Pair]]:
    """The cell of least loss among those that skip enough, on the staircase that bounds them.

    Both values must not fall along a row or a column: the best cell then is on the staircase.

    Args:
        evaluate: share skipped and loss at a cell; each is asked for once.
        rows, columns: size of the table.
        target: least share to skip.

    Returns:
        The cell, ``(-1, -1)`` if even the last skips too little, and what was evaluated, in that order.
    """
    known: dict[tuple[int, int], Pair] = {}

    def at(row: int, column: int) -> Pair:
        if (row, column) not in known:
            known[row, column] = evaluate(row, column)
        return known[row, column]

    best, least, column = (-1, -1), math.inf, columns - 1
    if at(rows - 1, columns - 1)[0] < target:
        return best, known
    for row in range(rows):
        while column >= 0 and at(row, column)[0] >= target:
            column -= 1
        if column + 1 < columns and at(row, column + 1)[1] < least:
            best, least = (row, column + 1), at(row, column + 1)[1]
    return best, known


@dataclass(frozen=True, eq=False)
class _Trial(Experts):
    """Skips by the factors and thresholds given, for calibration, and counts.

    ``count`` holds how many of the pairs of row and expert were skipped, and how many there were.
    """

    special: tuple[int, ...]
    threshold: Pair
    factors: Mapping[int, Tensor | Pair]
    echo: bool = False
    count: list[Any] = field(default_factory=lambda: [0, 0])
    name = "modes"

    @property
    def echoes(self) -> bool:
        return self.echo

    def weighed(self, traits: Traits) -> tuple[int, ...]:
        return tuple(self.factors)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return (Ids(),)

    def weigh(self, layer: int, weights: Tensor, index: Tensor, layout: Layout, seen: Seen, state: State) -> Tensor:
        special = upload(self.special, weights.device, torch.long)
        text, vision = modalities(seen[Ids()], layout, special)
        drop = skipped(weights, text, vision, self.factors[layer], self.threshold)
        self.count[0] = self.count[0] + drop.sum().cpu()
        self.count[1] = self.count[1] + sum(layout.live) * weights.shape[-1]
        return weights.masked_fill(drop, 0)


@register
@dataclass(frozen=True)
class MoDES(Experts, Offline):
    """Skip experts of little weight, in layers and for tokens where that moves the answers least."""

    name = "modes"
    title = "MoDES"
    group = "in_llm"
    paper = "arXiv 2511.15690"
    helps = "Mixture-of-experts models: no token is lost, and each runs fewer experts, in the prompt and in every step."
    needs = ("a mixture-of-experts model", "factors and thresholds (calibrated)")
    identity_at = {"tau_text": 0.0, "tau_vision": 0.0}  # noqa: RUF012
    bound = ("skip", "factors", "instead", "points", "reach_text", "reach_vision")
    answered = True

    skip: Annotated[float, In(0, 1)] = 0.6
    """At calibration: share of all pairs of token and chosen expert that is to be skipped at least."""
    tau_text: Annotated[float, AtLeast(0)] | None = None
    """Threshold of text; None = the calibrated one. 0 skips nothing."""
    tau_vision: Annotated[float, AtLeast(0)] | None = None
    """Threshold of vision tokens; None = the calibrated one."""
    factors: Literal["modality", "layer"] = "modality"
    """At calibration: a factor for each layer and modality, as the code has it, or one for each layer, as the paper says."""
    instead: Literal["input", "nothing"] = "input"
    """At calibration: what a layer gives for tokens all of whose experts are skipped to find its factor: the input of its
    experts, as in the code, or zeros.
    """
    points: Annotated[int, AtLeast(2)] = 100
    """At calibration: thresholds to choose from for each modality; two to three times as many runs over all samples."""
    reach_text: Annotated[float, AtLeast(0)] = 0.71
    """At calibration: x of the largest threshold of text, ``2 / (1 + exp(-10 (x - 1)))``. The defaults are for models of
    dozens of layers, where factors that add up to 1 are small.
    """
    reach_vision: Annotated[float, AtLeast(0)] = 0.6
    """The same of vision tokens."""

    def check(self, traits: Traits) -> str | None:
        """Needs numbers wherever it acts; that there are experts is checked for every such method."""
        return self.refuse_numbers(traits, "needs factors of this model's layers") if self.weighed(traits) else None

    def weighed(self, traits: Traits) -> tuple[int, ...]:
        """All layers with experts, unless both thresholds are 0."""
        return () if self.tau_text == self.tau_vision == 0 else traits.sparse

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The tokens' ids, which tell special ones apart, and the numbers."""
        return (Ids(), Numbers(self.name)) if self.weighed(traits) else ()

    def workspace(self, shape: Shape) -> int:
        """Rows for the experts that run."""
        return shape.survivors

    def weigh(self, layer: int, weights: Tensor, index: Tensor, layout: Layout, seen: Seen, state: State) -> Tensor:
        """What falls below the threshold weighs nothing; all else keeps its weight."""
        numbers = seen[Numbers(self.name)]
        known = state.get("prefill", self.name)
        if known is None or known[0] is not layout:
            known = layout, modalities(seen[Ids()], layout, numbers["special"])
            state.put("prefill", self.name, known)
        given = zip((self.tau_text, self.tau_vision), numbers["thresholds"], strict=True)
        of_text, of_vision = (calibrated if tau is None else tau for tau, calibrated in given)
        (text, vision), factor = known[1], numbers["factors"][layer]
        return weights.masked_fill(skipped(weights, text, vision, factor, (of_text, of_vision)), 0)

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Factors ``[layers, 2]`` (0 in dense layers) of text and vision, thresholds, special ids, and all that was tried.

        Raises:
            FoveateError: if the model has no experts, or even the largest thresholds skip too little.
        """
        layers, family = call.traits.sparse, call.traits.family
        if not layers:
            raise FoveateError(f"{self.name}: {family} has no experts; load a mixture-of-experts model such as qwen3_vl_moe")
        kinds: list[Pair] = [(math.inf, 0), (0, math.inf)] if self.factors == "modality" else [(math.inf, math.inf)]
        call.begin("skipping one layer at a time", (1 + len(layers) * len(kinds)) * call.batches)
        original = list(call.answers(Recipe()))

        def without(layer: int, kind: Pair) -> float:
            return _moved(call, original, _Trial(call.special, kind, {layer: (0, 0)}, self.instead == "input"))

        of_kind = [normalised([without(layer, kind) for layer in layers]) for kind in kinds]
        factors = torch.zeros(call.traits.decoder_layers, 2)
        factors[list(layers)] = torch.tensor(of_kind).T
        text, vision = grid(self.points, self.reach_text), grid(self.points, self.reach_vision)

        def evaluate(row: int, column: int) -> Pair:
            trial = _Trial(call.special, (text[row], vision[column]), {layer: factors[layer] for layer in layers})
            loss = _moved(call, original, trial)
            return int(trial.count[0]) / trial.count[1], loss

        call.begin("searching for thresholds", 3 * self.points * call.batches)
        (row, column), tried = frontier(evaluate, self.points, self.points, self.skip)
        if row < 0:
            most = tried[self.points - 1, self.points - 1][0]
            raise FoveateError(
                f"{self.name}: skip={self.skip}: the largest thresholds skip {most:.3f}; give that or less, or larger "
                "thresholds (reach_text=1.0, reach_vision=1.0 are beyond all factors; special tokens are never skipped)"
            )
        return {
            "skipped": tried[row, column][0],
            "thresholds": [text[row], vision[column]],
            "factors": factors,
            "special": torch.tensor(call.special, dtype=torch.long),
            "tried": torch.tensor([[text[i], vision[j], *found] for (i, j), found in tried.items()]),
        }


def _moved(call: ModelCall, original: Sequence[Tensor], trial: _Trial) -> float:
    """Mean over the answers' tokens of how far their distributions move under a trial, in nats."""
    moved = [
        divergence(changed, plain).clamp(min=0)  # KL(plain || changed)
        for plain, changed in zip(original, call.answers(Recipe((trial,))), strict=True)
    ]
    return float(torch.cat(moved).mean())


def normalised(moved: Sequence[float]) -> list[float]:
    """Importance of each layer, adding up to 1; equal where nothing moved."""
    total = sum(moved)
    return [each / total for each in moved] if total else [1 / len(moved)] * len(moved)
