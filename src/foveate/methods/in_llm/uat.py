"""UAT: a prediction leaves early once an exit head is sure of it; how sure it has to be, a bandit learns while it runs.

Paper: "Beyond Greedy Exits: Improved Early Exit Decisions for Risk Control and Reliability", arXiv 2509.23666. No code was
available. Published for classifiers and encoder-decoder models, one decision a sample; exits of a decoder-only model, one
decision for each token that is predicted, are this library's extension: the row that predicts is asked before some decoder
layers. There a small translator (low rank, added to the identity) and the model's own final norm and head give class
probabilities; if the largest reaches the threshold, no further layer runs for the prompt (the token), keys and values of the
layers behind are made of the state that it leaves with, and the logits are those of the exit head.

A sample of the bandit is one forward: a prompt, or a step of decoding. A batch has one threshold and its mean reward. The
state is the session's, shared by its threads (``session.remembered("uat")``). The host waits for the device once at each
exit, and once more for the reward.

Reconstructed: a linear reliability model ``g`` behind a sigmoid, large where a prediction is reliable, which gets the share
of the layers that have run; the penalty of its coverage, squared; UCB1's constant; risk bound and coverage; the rank of the
translators. Training (``foveate calibrate uat``) is self-labelled: what the full model predicts is right
(``target="answer"``: the answers that stand behind the prompts), at the rows that predict answers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from threading import Lock
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.exits import Exits, Leaving
from foveate.core.layout import Layout
from foveate.core.method import Offline
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, In, Layers, Shares
from foveate.core.recipe import Recipe
from foveate.core.registry import register
from foveate.core.roles import Role
from foveate.core.shape import FLOAT, Shape
from foveate.core.signal import Function, Hidden, Ids, Numbers, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable

ROWS = 256
"""Rows that a step of training looks at."""


def reward(confidence: Tensor, reliable: Tensor, layers: int, lam: float) -> Tensor:
    """``C * (1 - C_g) - psi(i)``: confidence, times reliability, less ``lam`` for each of the ``layers`` that ran."""
    return confidence * reliable - lam * layers


def reliability(probabilities: Tensor, depth: float, weight: Tensor) -> Tensor:
    """``[...]`` in [0, 1]: the sigmoid of a linear function of probabilities ``[..., V]`` and ``depth``.

    ``weight`` ``[V + 2]`` ends with that of ``depth`` and the constant.
    """
    return (probabilities @ weight[:-2] + depth * weight[-2] + weight[-1]).sigmoid()


def upper_bound(values: Sequence[float], pulls: Sequence[int], beta: float) -> list[float]:
    """UCB's index of each arm, given the mean rewards and how often each was pulled, all of them at least once."""
    logarithm = math.log(sum(pulls))
    return [value + beta * math.sqrt(logarithm / count) for value, count in zip(values, pulls, strict=True)]


def exit_loss(entropy: Tensor, reliable: Tensor, coverage: float) -> Tensor:
    """Mean of the cross entropies ``[T]`` times one plus reliability ``[T]``, and the square of what coverage lacks."""
    return (entropy * (1 + reliable)).mean() + (coverage - reliable.mean()).clamp(min=0) ** 2


def translated(x: Tensor, down: Tensor, up: Tensor, bias: Tensor) -> Tensor:
    """``x`` ``[..., D]`` plus a function of it of low rank (``down`` ``[R, D]``, ``up`` ``[D, R]``, ``bias`` ``[D]``)."""
    wide = x.float()
    return (wide + wide @ down.T @ up.T + bias).to(x.dtype)


class Bandit:
    """Which threshold is worth most (UCB). Threads may share one.

    Attributes:
        arms: the thresholds.
        pulls: how often each was used to the end.
        values: mean reward of each.
    """

    def __init__(self, arms: Sequence[float], beta: float) -> None:
        self.arms, self.beta = tuple(arms), beta
        self.pulls, self.values = [0] * len(self.arms), [0.0] * len(self.arms)
        self._lock = Lock()

    def choose(self) -> int:
        """Number of the next arm: the first that was never pulled, else the one with the highest index."""
        with self._lock:
            if 0 in self.pulls:
                return self.pulls.index(0)
            bounds = upper_bound(self.values, self.pulls, self.beta)
        return bounds.index(max(bounds))

    def learn(self, arm: int, gained: float) -> None:
        """The reward of a pull."""
        with self._lock:
            self.pulls[arm] += 1
            self.values[arm] += (gained - self.values[arm]) / self.pulls[arm]

    def state(self) -> dict[str, Any]:
        """All that it knows, as JSON can say it."""
        with self._lock:
            return {"arms": list(self.arms), "pulls": list(self.pulls), "values": list(self.values)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` said.

        Raises:
            FoveateError: if it is of other arms.
        """
        if tuple(state["arms"]) != self.arms:
            raise FoveateError(
                f"uat: arms={list(state['arms'])}: the state is of these; must be those of the recipe, {self.arms}"
            )
        with self._lock:
            self.pulls, self.values = list(state["pulls"]), list(state["values"])


@register
@dataclass(frozen=True)
class UAT(Exits, Offline):
    """Let a token leave before the last layer once the threshold that the bandit chose is reached."""

    name = "uat"
    title = "UAT"
    group = "in_llm"
    paper = "arXiv 2509.23666"
    helps = "Where many answers are easy, and layers should be saved in every step of decoding, too."
    needs = ("exit heads and a reliability model (calibrated)",)
    identity_at = {"tau": 1.01}  # noqa: RUF012
    bound = ("target", "coverage", "rank", "steps", "rate")
    answered = True

    tau: Annotated[float, AtLeast(0)] | None = None
    """A fixed threshold instead of the bandit's; above 1 nothing leaves early."""
    arms: Annotated[tuple[float, ...], Shares()] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
    """The thresholds that the bandit chooses from."""
    eps: Annotated[float, In(0, 1)] = 0.1
    """The risk that is tolerated: what all layers together cost of the reward."""
    beta: Annotated[float, AtLeast(0)] = math.sqrt(2)
    """How much the bandit favours thresholds that it has seldom used; as it is, for hundreds of tokens."""
    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Decoder layers before which a token may leave; None = at each quarter of the depth."""
    target: Literal["model", "answer"] = "model"
    """At calibration: whether what the full model predicts is right, or the answers behind the prompts."""
    coverage: Annotated[float, In(0, 1)] = 0.8
    """At calibration: mean reliability below which there is a penalty."""
    rank: Annotated[int, AtLeast(1)] | None = None
    """At calibration: rank of the translators; None = 1/16 of the model's width."""
    steps: Annotated[int, AtLeast(0)] = 500
    """At calibration: steps of training."""
    rate: Annotated[float, AtLeast(0)] = 1e-3
    """At calibration: learning rate."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(bool(self.arms), "arms", "must be at least one threshold, such as (0.5, 0.9)")

    def fitted(self, traits: Traits) -> Self:
        """Quarters of the depth, unless layers are given."""
        if self.layers is not None:
            return self
        quarters = traits.same_depth((1, 2, 3), 4)
        return replace(self, layers=tuple(layer for layer in quarters if layer < traits.decoder_layers))

    def check(self, traits: Traits) -> str | None:
        """Needs a layer to leave out, and exit heads trained at its layers."""
        layers = self.fitted(traits).layers or ()
        reason = traits.refuse_layers("layers", layers)
        if reason or not self.exits(traits):
            return reason
        numbers = self.numbers(traits)
        if numbers is None:
            return self.refuse_numbers(traits, "needs exit heads trained on this model")
        missing = [layer for layer in layers if layer not in numbers["layers"]]
        if missing:
            return (
                f"layers={layers}: has exit heads at {tuple(numbers['layers'])} only; calibrate it again with these layers"
            )
        return None

    def exits(self, traits: Traits) -> tuple[int, ...]:
        """Its layers, unless nothing can reach the threshold."""
        return () if self.tau is not None and self.tau > 1 else self.fitted(traits).layers or ()

    def memory(self, traits: Traits) -> Bandit | None:
        """The bandit; None where the threshold is fixed."""
        return Bandit(self.arms, self.beta) if self.tau is None else None

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Exit heads: what was trained, and the model's final norm and head."""
        return (Numbers(self.name), Function("norm"), Function("head")) if self.exits(traits) else ()

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """A bandit would go on learning from trial to trial; how sure an exit head has to be can be searched instead."""
        return {"tau": (0.5, 0.7, 0.8, 0.9, 0.95)}

    def workspace(self, shape: Shape) -> int:
        """Rows that pass by, and class probabilities of each sample."""
        return shape.routing + 4 * shape.samples * (shape.vocabulary + shape.width) * FLOAT

    def leave(self, layer: int, x: Tensor, asked: Tensor, seen: Seen, state: State) -> Leaving:
        """Those whose largest class probability reaches the threshold."""
        numbers = seen[Numbers(self.name)]
        which = numbers["layers"].index(layer)
        rows = translated(x, *(numbers[name][which] for name in ("down", "up", "bias")))
        probabilities = _probabilities(rows, seen)
        confidence = probabilities.amax(-1)
        arm = self._arm(state)
        leaves = confidence >= (self.arms[arm] if self.tau is None else self.tau)
        if self.tau is None:
            self._gain(layer, probabilities, leaves & asked, seen, state)
        return Leaving(leaves, rows)

    def ended(self, x: Tensor, stayed: Tensor, asked: Tensor, seen: Seen, state: State) -> None:
        """Rewards are there: the bandit learns from their mean."""
        if self.tau is not None:
            return
        layers = state.get("session", "traits").decoder_layers
        self._gain(layers, _probabilities(x, seen), stayed, seen, state)
        gained = state.get("prefill", "uat gained").sum() / asked.sum()
        state.get("session", self.name).learn(self._arm(state), float(gained))

    @torch.no_grad()
    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Translators of all exits, and the reliability model, trained together on rows that predict answers.

        Also with which share of these rows each exit agrees with the full model.
        """
        layers = self.fitted(call.traits).layers or ()
        call.begin("reading", 2 * call.batches)
        full = torch.cat([logits.float() for logits in call.answers(Recipe())])
        signals: list[Signal] = [Hidden(Site("decoder", layer)) for layer in layers]
        signals += [Ids(), Function("norm"), Function("head")]
        states, words = list[Tensor](), list[Tensor]()
        for layout, seen in call.read(*signals):
            rows = predicting(layout)
            states.append(torch.stack([seen[Hidden(Site("decoder", layer))][rows] for layer in layers]))
            words.append(seen[Ids()].roll(-1, 1)[rows])
        x, depth = torch.cat(states, dim=1), call.traits.decoder_layers
        right = full.argmax(-1) if self.target == "model" else torch.cat(words)
        if x.shape[1] != len(full):
            raise FoveateError("uat: some words of an answer have no label; give answers that are labelled to their end")
        generator = torch.Generator().manual_seed(0)
        rank = self.rank or max(x.shape[2] // 16, 1)
        down = torch.randn(len(layers), rank, x.shape[2], generator=generator) * x.shape[2] ** -0.5
        made = [down, torch.zeros(len(layers), x.shape[2], rank), torch.zeros(len(layers), x.shape[2])]
        down, up, bias, weight = trained = [p.to(x.device) for p in (*made, torch.zeros(full.shape[1] + 2))]
        adam = torch.optim.Adam([parameter.requires_grad_() for parameter in trained], self.rate)
        call.begin("training", self.steps)
        for _ in range(self.steps):
            some = torch.randint(len(full), (ROWS,), generator=generator).to(x.device)
            with torch.enable_grad():
                total = torch.zeros((), device=x.device)
                exits = [_logits(translated(x[i, some], down[i], up[i], bias[i]), seen) for i in range(len(layers))]
                for layer, logits in zip((*layers, depth), (*exits, full[some]), strict=True):
                    entropy = torch.nn.functional.cross_entropy(logits, right[some], reduction="none")
                    reliable = reliability(logits.softmax(-1), layer / depth, weight)
                    total = total + layer * exit_loss(entropy, reliable, self.coverage)
                gradients = torch.autograd.grad(total / (sum(layers) + depth), trained, allow_unused=True)
            for parameter, gradient in zip(trained, gradients, strict=True):
                parameter.grad = gradient
            adam.step()
            call.advance()
        agrees = {
            f"exit before layer {layer}, agreement": float(
                (_logits(translated(x[i], down[i], up[i], bias[i]), seen).argmax(-1) == full.argmax(-1)).float().mean()
            )
            for i, layer in enumerate(layers)
        }
        named = zip(("down", "up", "bias", "reliability"), trained, strict=True)
        return {"layers": list(layers), **agrees, **{name: tensor.detach().cpu() for name, tensor in named}}

    def _arm(self, state: State) -> int:
        """This forward's arm."""
        if self.tau is not None:
            return 0
        if state.get("prefill", "uat arm") is None:
            state.put("prefill", "uat arm", state.get("session", self.name).choose())
        arm: int = state.get("prefill", "uat arm")
        return arm

    def _gain(self, layers: int, probabilities: Tensor, those: Tensor, seen: Seen, state: State) -> None:
        """Note the reward of ``those`` ``[B, Q]`` rows, which end after so many layers."""
        depth = state.get("session", "traits").decoder_layers
        reliable = reliability(probabilities, layers / depth, seen[Numbers(self.name)]["reliability"])
        gained = reward(probabilities.amax(-1), reliable, layers, self.eps / depth).masked_fill(~those, 0)
        state.put("prefill", "uat gained", gained + state.get("prefill", "uat gained", 0))


def predicting(layout: Layout) -> Tensor:
    """``[B, N]`` bool: rows in front of an answer's; the prompt's last, where no answers are told."""
    if not any(layout.answers):
        return torch.zeros_like(layout.valid).scatter(1, layout.last, True)
    return torch.nn.functional.pad((layout.role == Role.ANSWER)[:, 1:], (0, 1))


def _logits(rows: Tensor, seen: Seen) -> Tensor:
    return seen[Function("head")](seen[Function("norm")](rows)).float()  # type: ignore[no-any-return]


def _probabilities(rows: Tensor, seen: Seen) -> Tensor:
    return _logits(rows, seen).softmax(-1)
