"""ALVTS: the card's worked examples, the selector against dense attention, and its fit on a model of plain tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.artifact import Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Plan
from foveate.core.roles import VISUAL
from foveate.core.signal import Function, Hidden, Numbers, Seen, Signal, Site
from foveate.core.state import State
from foveate.methods import ALVTS
from foveate.methods.in_llm.alvts import FACTORS, context_and_relevance, low_rank, misfit, projected
from foveate.ops.attention import causal
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits

LAYERS, HEADS, KV_HEADS, WIDTH = 2, 4, 2, 4
DIM = 12
SMALL = Fingerprint("llava", LAYERS, DIM, 64)

TEXT_FIRST = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [0.5, 3.0]]])
"""The card's rows: one of text, three visual ones."""
W_Q, W_K = torch.diag(torch.tensor([2.0, 0.1])), torch.diag(torch.tensor([1.0, 0.5]))
VISUAL_ROWS = torch.tensor([[False, True, True, True]])


def by_rank(rank: int) -> Tensor:
    query, key = (projected(TEXT_FIRST, *low_rank(weight, rank), width=2) for weight in (W_Q, W_K))
    return context_and_relevance(query, key, VISUAL_ROWS, ~VISUAL_ROWS)


def test_the_full_rank_example() -> None:
    assert_close(by_rank(2)[0, 1:], torch.tensor([0.103466, 0.014437, 0.045892]), atol=1e-6, rtol=0)


def test_both_factors_of_the_full_rank_example() -> None:
    query, key = (TEXT_FIRST @ weight.T for weight in (W_Q, W_K))
    attention = (query @ key.mT / 2**0.5).softmax(-1)[0]

    assert_close(attention[1:, 1:].mean(0), torch.tensor([0.293439, 0.162563, 0.237404]), atol=1e-6, rtol=0)
    assert_close(attention[0, 1:], torch.tensor([0.352598, 0.088807, 0.193308]), atol=1e-6, rtol=0)
    assert_close(by_rank(2)[0, 1:], attention[1:, 1:].mean(0) * attention[0, 1:])


def test_the_rank_one_example() -> None:
    assert_close(by_rank(1)[0, 1:], torch.tensor([0.113106, 0.014606, 0.039042]), atol=1e-6, rtol=0)


def test_the_distance_of_the_rank_one_example() -> None:
    distance = misfit(by_rank(1), by_rank(2), VISUAL_ROWS, torch.ones_like(VISUAL_ROWS))

    assert distance.item() / 4**4 == pytest.approx(4.6629e-5, rel=1e-3)


@given(st.integers(1, 5), st.integers(0, 99))
def test_factors_are_the_best_of_their_rank(rank: int, seed: int) -> None:
    weight = torch.randn(8, 5, generator=torch.Generator().manual_seed(seed))
    inner, outer = low_rank(weight, rank)

    error = (weight - outer @ inner).square().sum()
    assert_close(error, torch.linalg.svdvals(weight)[rank:].square().sum(), atol=1e-4, rtol=1e-4)


@given(prompts(), st.sampled_from(["mean", "joint"]), st.booleans(), st.integers(0, 99))
def test_scores_are_those_of_the_whole_map(before: Layout, head_mode: Any, masked: bool, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, rows = before.shape
    query = torch.randn(batch, HEADS, rows, WIDTH, generator=generator)
    key = torch.randn(batch, KV_HEADS, rows, WIDTH, generator=generator)
    visual, text = before.rows(*VISUAL), before.valid & ~before.rows(*VISUAL)

    logits = query @ key.repeat_interleave(HEADS // KV_HEADS, dim=1).mT * WIDTH**-0.5
    logits = logits.sum(1, keepdim=True) if head_mode == "joint" else logits
    if masked:
        see = torch.ones(rows, rows, dtype=torch.bool).tril() & before.valid[:, None]
        logits = logits.masked_fill(~see[:, None], float("-inf"))
    attention = logits.softmax(-1).nan_to_num(0).mean(1)
    from_visual, from_text = (
        (attention * kind[..., None]).sum(1) / kind.sum(1, keepdim=True).clamp(min=1) for kind in (visual, text)
    )
    allowed = causal(before.valid) if masked else None
    scores = context_and_relevance(query, key, visual, text, allowed, head_mode)
    assert_close(scores, from_visual * from_text)


class Call:
    """Calibration prompts on a model of plain tensors, a `ModelCall`."""

    def __init__(self, batches: int = 3) -> None:
        generator = torch.Generator().manual_seed(0)
        self.traits = traits(SMALL)
        self.weights = {
            "query": torch.randn(LAYERS, HEADS * WIDTH, DIM, generator=generator).requires_grad_(),
            "key": torch.randn(LAYERS, KV_HEADS * WIDTH, DIM, generator=generator).requires_grad_(),
        }
        self.scale = torch.ones(DIM).requires_grad_()
        self.prompts = [layout("tt11111111tt", "..111111tttt") for _ in range(batches)]
        self.hidden = [torch.randn(LAYERS, 2, 12, DIM, generator=generator) for _ in range(batches)]
        self.reads = 0
        self.batches = batches
        self.begun: list[tuple[str, int]] = []

    def begin(self, what: str, steps: int) -> None:
        self.begun.append((what, steps))

    def logits(self, recipe: Any) -> Tensor:
        raise NotImplementedError

    def weight(self, layer: int, name: str) -> Tensor:
        return self.weights[name][layer]

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        for prompt, hidden in zip(self.prompts, self.hidden):
            self.reads += 1
            known = {Hidden(Site("decoder", layer)): hidden[layer] for layer in range(LAYERS)} | self.functions()
            yield prompt, {signal: known[signal] for signal in signals}

    def functions(self) -> dict[Signal, Any]:
        def norm(x: Tensor) -> Tensor:
            return torch.nn.functional.rms_norm(x, (DIM,), self.scale)

        def query_key(layer: int) -> Any:
            def made(x: Tensor, prompt: Layout, rope: bool = True) -> tuple[Tensor, Tensor]:
                query, key = (
                    (norm(x) @ self.weight(layer, name).T).unflatten(-1, (-1, WIDTH)).transpose(1, 2)
                    for name in ("query", "key")
                )
                return (rotate(query, prompt.positions), rotate(key, prompt.positions)) if rope else (query, key)

            return made

        found: dict[Signal, Any] = {}
        for layer in range(LAYERS):
            found[Function("norm", layer)] = norm
            found[Function("query_key", layer)] = query_key(layer)
            found[Function("rotate", layer)] = rotate
        return found


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    angle = positions[0][:, None, :, None] * torch.tensor([1.0, 0.1])
    first, second = x.chunk(2, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def distance(call: Call, method: ALVTS, numbers: Any) -> float:
    """Mean misfit over layers and prompts."""
    total = 0.0
    for prompt, seen in call.read(*call.functions(), *(Hidden(Site("decoder", layer)) for layer in range(LAYERS))):
        visual = prompt.rows(*VISUAL)
        for layer in range(LAYERS):
            x = seen[Hidden(Site("decoder", layer))]
            teacher = context_and_relevance(
                *seen[Function("query_key", layer)](x, prompt), visual, prompt.valid & ~visual, causal(prompt.valid)
            )
            factors = [numbers[name][layer] for name in FACTORS]
            normed = seen[Function("norm", layer)](x)
            scores = method._scores(layer, normed, prompt, seen, factors, numbers["head_width"])
            total += misfit(scores, teacher, visual, prompt.valid).item()
    return total


def test_selectors_of_full_rank_that_rotate_score_as_the_layer_does() -> None:
    call, method = Call(), ALVTS(rank=64, steps=0, rope=True)

    assert distance(call, method, method.calibrate(call)) < 1e-8


def test_alignment_brings_the_selectors_nearer_to_the_layers() -> None:
    call = Call()
    plain, aligned = ALVTS(rank=3, steps=0), ALVTS(rank=3, steps=60, rate=3e-3)

    assert distance(call, aligned, aligned.calibrate(call)) < 0.7 * distance(call, plain, plain.calibrate(call))


def test_alignment_is_deterministic_and_takes_its_steps_in_turn() -> None:
    first, second = Call(), Call()
    one, other = (ALVTS(rank=3, steps=7).calibrate(call) for call in (first, second))

    assert first.reads == 7
    assert all(torch.equal(one[name], other[name]) for name in FACTORS)


def test_alignment_leaves_the_model_alone() -> None:
    call = Call()
    before = {name: weight.detach().clone() for name, weight in call.weights.items()}
    ALVTS(rank=3, steps=3).calibrate(call)

    assert all(torch.equal(before[name], weight) for name, weight in call.weights.items())
    assert all(weight.grad is None for weight in (*call.weights.values(), call.scale))


def test_alignment_without_samples_is_refused() -> None:
    with pytest.raises(FoveateError, match="at least one sample"):
        ALVTS().calibrate(Call(batches=0))


def test_factors_have_the_rank_asked_for_or_that_of_the_weights() -> None:
    numbers = ALVTS(rank=10, steps=1).calibrate(Call())

    assert numbers["query_in"].shape == (LAYERS, 10, DIM)
    assert numbers["query_out"].shape == (LAYERS, HEADS * WIDTH, 10)
    assert numbers["key_in"].shape == (LAYERS, KV_HEADS * WIDTH, DIM)
    assert not any(numbers[name].requires_grad for name in FACTORS)


def plan(method: ALVTS, prompt: Layout, seed: int = 0, layer: int = 0) -> Plan | None:
    call = Call()
    numbers = ALVTS(rank=3, steps=0).calibrate(call)
    # Aligned at the end, so that padding on the left changes nothing.
    x = torch.randn(9, 20, DIM, generator=torch.Generator().manual_seed(seed))[: prompt.shape[0], -prompt.shape[1] :]
    return method.plan(layer, x, prompt, {Numbers("alvts"): numbers, **call.functions()}, State())


@given(st.floats(0.1, 0.9), st.integers(0, 9))
def test_all_text_and_the_floored_share_of_the_visual_rows_are_active(keep: float, seed: int) -> None:
    prompt = layout("tt11111111tt", "..111111tttt")
    made = plan(ALVTS(keep=keep), prompt, seed)
    assert made is not None
    visual = prompt.rows(*VISUAL)

    counts = [max(int(8 * keep), 1), max(int(6 * keep), 1)]
    assert not made.frozen
    assert torch.equal(made.active & ~visual, prompt.valid & ~visual)
    assert (made.active & visual).sum(1).tolist() == counts
    assert made.counts == tuple(made.active.sum(1).tolist())


def test_a_sample_gets_in_a_batch_what_it_gets_alone() -> None:
    together = plan(ALVTS(keep=0.4), layout("tt11111111tt", "tt11111111tt", "..111111tttt"))
    alone = plan(ALVTS(keep=0.4), layout("tt11111111tt"))
    shorter = plan(ALVTS(keep=0.4), layout("..tt11111111tt"))
    assert together is not None
    assert alone is not None
    assert shorter is not None

    assert together.active[0].tolist() == alone.active[0].tolist() == shorter.active[0, 2:].tolist()


def test_of_equal_tokens_the_first_are_active() -> None:
    prompt = layout("t1111t")
    call = Call()
    numbers = ALVTS(rank=3, steps=0).calibrate(call)
    x = torch.ones(1, 6, DIM)
    method = ALVTS(keep=0.5, causal=False)
    made = method.plan(0, x, prompt, {Numbers("alvts"): numbers, **call.functions()}, State())
    assert made is not None

    assert made.active.tolist() == [[True, True, True, False, False, True]]


def test_a_share_of_nothing_leaves_the_layer_to_the_text() -> None:
    made = plan(ALVTS(ratios=(0.0, 1.0)), layout("tt1111tt"))
    assert made is not None

    assert made.active.tolist() == [[True, True, False, False, False, False, True, True]]
    assert plan(ALVTS(ratios=(0.0, 1.0)), layout("tt1111tt"), layer=1) is None


def test_text_alone_runs_plainly() -> None:
    assert plan(ALVTS(), layout("tttttt")) is None


def test_the_whole_budget_routes_nothing() -> None:
    assert ALVTS(keep=1.0).routed(traits(SMALL)) == ()
    assert ALVTS(keep=1.0).reads(traits(SMALL)) == ()
    assert ALVTS(keep=1.0).check(traits(SMALL)) is None
    assert ALVTS().routed(traits(SMALL)) == (0, 1)
    assert ALVTS(ratios=(1.0, 0.5)).routed(traits(SMALL)) == (1,)


def test_it_reads_selectors_and_norms() -> None:
    assert ALVTS().reads(traits(SMALL)) == (Numbers("alvts"), Function("norm", 0), Function("norm", 1))


FITTED = ALVTS().artifact(SMALL, {})


@pytest.mark.parametrize(
    ("method", "model", "remedy"),
    [
        (ALVTS(), traits(SMALL), "run `foveate calibrate alvts` on this model"),
        (ALVTS(causal=False, rank=4), traits(SMALL), 'run `foveate calibrate "alvts(causal=False, rank=4)"` on this model'),
        (ALVTS(ratios=(0.5,)), traits(SMALL, artifacts={"alvts": FITTED}), "must be 2 shares, one for each layer"),
        (ALVTS(), traits(SMALL, artifacts={"alvts": FITTED}, recurrent=(1,)), "use fastv"),
        (ALVTS(), traits(SMALL, artifacts={"alvts": FITTED}), None),
    ],
    ids=["no selectors", "none of this kind", "other depth", "recurrent", "hosted"],
)
def test_what_cannot_be_routed_is_refused_with_the_remedy(method: ALVTS, model: Any, remedy: str | None) -> None:
    reason = method.check(model)

    assert reason is None if remedy is None else str(reason).endswith(remedy)


def test_selectors_of_another_model_are_refused() -> None:
    other = replace(FITTED, fingerprint=Fingerprint("llava", 3, DIM, 64))
    with pytest.raises(FoveateError, match="calibrate it again"):
        ALVTS().check(traits(SMALL, artifacts={"alvts": other}))


@pytest.mark.parametrize("other", [{"causal": False}, {"head_mode": "joint"}, {"rope": True}, {"rank": 2}, {"steps": 3}])
def test_selectors_that_were_fitted_otherwise_are_refused(other: dict[str, Any]) -> None:
    known = traits(SMALL, artifacts={"alvts": FITTED})
    ((name, value),) = other.items()

    with pytest.raises(FoveateError, match=f"made with {name}=.*calibrate it again with {name}={value!r}"):
        ALVTS(**other).check(known)
    assert ALVTS(keep=0.7).check(known) is None


@pytest.mark.parametrize(
    ("parameter", "value"),
    [("keep", 0), ("keep", 1.5), ("ratios", (2.0,)), ("ratios", 0.5), ("head_mode", "max"), ("rank", 0), ("steps", -1)],
)
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"alvts: {parameter}="):
        ALVTS(**{parameter: value})
