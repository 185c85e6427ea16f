"""DTR: a few gradient steps turn down the visual tokens that lead a prompt away from refusal; the lowest are evicted.

A defence against pictures that talk a model into answering what it would refuse; what goes makes it cheaper, too. Each
visual token's embedding gets a weight in [0, 1], 1 at first. A few steps of AdamW lower how far the last prompt token's
hidden state at a middle layer lies along the direction from harmful to harmless prompts, as seen on text (`foveate calibrate
dtr`), and hold it near where it was. Paper: "Robustifying Vision-Language Models via Dynamic Token Reweighting", arXiv
2505.17132.

Made from public notes about the paper; neither its code nor its text was at hand. Reconstructed: one pool for all pictures
of a prompt; the last token is that of the prompt with its template; weights scale the embeddings before the first layer, and
the prompt is then read with them, where others may scale cached keys and values; rows that a family adds in later layers
(DeepStack) are not scaled. How low a weight must be for its token to go is not published: AdamW moves a weight by about
``rate`` a step, so four steps of 0.01 leave none much below 0.96, and the lowest share goes, ranked by weight; ``beta`` is
the paper's threshold. The first layer's norm undoes a scale, which lives on in the residual alone. The layers run once for
each step beside the prompt, and back, which the report's FLOPs leave out; weights that require no gradients
(`model.requires_grad_(False)`) save memory there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Edit, Layout
from foveate.core.method import Offline, Tokens
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Hidden, Numbers, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.gradients import constant, descended, recorded
from foveate.ops.select import top_rows

HARMFUL, HARMLESS = "harmful", "harmless"
TINY = 1e-12


def projection(states: Tensor, direction: Tensor) -> Tensor:
    """How far ``states`` ``[..., D]`` lie along ``direction`` ``[D]``, whatever its length: ``[...]``."""
    return (states * torch.nn.functional.normalize(direction, dim=0, eps=TINY)).sum(-1)


def reversal_loss(states: Tensor, before: Tensor, direction: Tensor, lam: float) -> Tensor:
    """The projection of ``states`` ``[B, D]``, and ``lam`` times their distance from those ``before``: ``[B]``."""
    # Where nothing has moved yet, the root alone has no gradient.
    moved = ((states - before).square().sum(-1) + TINY).sqrt()
    return projection(states, direction) + lam * moved


def reweighed(
    states: Callable[[Tensor], Tensor],
    tokens: Tensor,
    direction: Tensor,
    steps: int = 4,
    rate: float = 0.01,
    lam: float = 0.1,
    decay: float = 0.0,
) -> Tensor:
    """Weights ``[B, N]`` that lower `reversal_loss`: in [0, 1] of the ``tokens`` ``[B, N]`` (bool), 1 elsewhere.

    Args:
        states: ``f(weights [B, N])`` -> ``[B, D]``, with gradients; a sample's depends on its own weights only.
        tokens: whose weights are sought.
        direction: ``[D]``.
        steps, rate, decay: of AdamW.
        lam: as in `reversal_loss`.
    """
    before: list[Tensor] = []

    def loss(weights: Tensor) -> Tensor:
        made = states(weights.where(tokens, 1.0))
        if not before:
            before.append(made.detach())
        return reversal_loss(made, before[0], direction, lam).sum()

    start = torch.ones(tokens.shape, dtype=direction.dtype, device=tokens.device)
    return descended(loss, start, steps, rate, decay).where(tokens, 1.0)


def scaled(x: Tensor, weights: Tensor) -> Tensor:
    """``x`` ``[B, N, D]`` times ``weights`` ``[B, N]``, in its own dtype."""
    return (x * weights[..., None]).to(x.dtype)


@register
@dataclass(frozen=True)
class DTR(Tokens, Offline):
    """Weigh the visual tokens by gradient steps towards refusal, and evict those that come out lowest."""

    name = "dtr"
    title = "DTR"
    group = "before_llm"
    paper = "arXiv 2505.17132"
    helps = (
        "Models that strangers show pictures to: tokens that lead away from refusal lose weight or go. A defence, which "
        "costs a few passes through the first layers, forwards and back; to be faster, take another method."
    )
    needs = ("harmful and harmless prompts (calibrated)", "gradients through the first decoder layers")
    identity_at = {"steps": 0, "keep": 1.0}  # noqa: RUF012
    labels = (HARMFUL, HARMLESS)

    keep: Annotated[int | float, Keep()] = 0.8
    """Visual tokens that are left of a sample, all of its pictures together: those of the largest weight."""
    beta: Annotated[float, In(0, 1)] | None = None
    """Instead of ``keep``: the weight below which a token goes. How many do depends on the picture, and is read from the
    device once; None = by rank.
    """
    layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer at whose input the last token's state is read, counted from 0: so many run ahead; None = 14 of 32."""
    steps: Annotated[int, AtLeast(0)] = 4
    """Steps of AdamW, each a pass through the layers and back; 0 leaves all weights at 1."""
    rate: Annotated[float, AtLeast(0)] = 0.01
    """Step size of AdamW: about what a weight moves in a step."""
    lam: Annotated[float, AtLeast(0)] = 0.1
    """How much it counts that the state stays where it was (the paper's lambda), beside that it moves towards refusal."""
    decay: Annotated[float, AtLeast(0)] = 0.0
    """Weight decay of AdamW, which pulls all weights towards 0 by ``rate * decay`` a step."""

    def fitted(self, traits: Traits) -> Self:
        """The layer at the published share of the depth."""
        (layer,) = traits.same_depth((14,), of=32)
        return replace(self, layer=self.layer or min(layer, traits.decoder_layers - 1))

    def check(self, traits: Traits) -> str | None:
        """The layer must be there, gradients pass through those before it, and a direction be known."""
        layer = self.fitted(traits).layer or 1
        recurrent = [number for number in traits.recurrent if number < layer]
        if self.steps and recurrent:
            return (
                f"layer={layer}: runs the layers before it apart from the prompt, and decoder layer {recurrent[0]} has a "
                "recurrent state; use another method, such as hiprune"
            )
        refused = traits.refuse_layers("layer", layer)
        if refused or not self.steps:
            return refused
        return self.refuse_numbers(traits, "no direction from harmful to harmless prompts is known for this model")

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The layers that run ahead, and the direction."""
        return (Function("through", self.fitted(traits).layer), Numbers(self.name)) if self.steps else ()

    def workspace(self, shape: Shape) -> int:
        """What the layers that run ahead leave for their gradients, and one of them while it makes these.

        Attention by a fused kernel. Weights that require no gradients leave about a quarter less.
        """
        if not self.steps:
            return shape.edits
        inner = shape.hidden // shape.width * shape.inner
        # Norms in float32, what goes into projections and attention and comes out of it, and four parts of a gated MLP.
        layer = 6 * shape.hidden + 2 * shape.floats(shape.hidden) + 5 * shape.queries + 3 * shape.keys + 4 * inner
        rows = 4 * shape.hidden + 2 * shape.floats(shape.hidden)
        return shape.edits + ((self.layer or 1) + 1) * layer + rows + 4 * shape.masks

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt; the budget is a share of the tokens that it came with."""
        budget, visual = Budget(self.keep), layout.rows(*VISUAL)
        counts = tuple(min(budget.of(there), alive) for there, alive in zip(layout.originals, layout.visual))
        if not self.steps and counts == layout.visual:
            return None
        weights = self._weights(x, layout, seen) if self.steps else torch.ones_like(layout.size)
        if self.beta is None:
            chosen = top_rows(weights, visual, counts)
        else:
            chosen = visual & (weights >= self.beta)
            counts = tuple(chosen.sum(1).tolist())
        edit = layout.keeping(chosen, counts)
        return replace(edit, values=edit.reduction.apply(scaled(x, weights)))

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """At the input of every layer, the mean state of harmless prompts' last tokens minus that of harmful ones'."""
        signals = [Hidden(Site("decoder", layer)) for layer in range(call.traits.decoder_layers)]
        found: dict[str, list[Tensor]] = {kind: [] for kind in self.labels}
        for (layout, seen), kinds in zip(call.read(*signals), call.labels, strict=True):
            sample = torch.arange(len(kinds), device=layout.last.device)
            states = torch.stack([seen[signal][sample, layout.last[:, 0]] for signal in signals], dim=1)
            for kind, of_sample in zip(kinds, states.float().cpu()):
                found[kind].append(of_sample)
        mean = {kind: torch.stack(states).mean(0) for kind, states in found.items()}
        return {"direction": mean[HARMLESS] - mean[HARMFUL]}

    def _weights(self, x: Tensor, layout: Layout, seen: Seen) -> Tensor:
        through = seen[Function("through", self.layer)]
        direction = seen[Numbers(self.name)]["direction"][self.layer]
        with recorded():
            rows, tokens, last = map(constant, (x, layout.rows(*VISUAL), layout.last))
            wide = torch.promote_types(x.dtype, torch.float32)
            sample = torch.arange(len(x), device=x.device)

            def states(weights: Tensor) -> Tensor:
                reached: Tensor = through(scaled(rows, weights))
                return reached[sample, last[:, 0]].to(wide)

            return reweighed(states, tokens, constant(direction).to(wide), self.steps, self.rate, self.lam, self.decay)
