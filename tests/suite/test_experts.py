"""Experts that a method takes from rows: their work is gone, the answer is that of a model which weighs them zero."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Experts
from foveate.core.recipe import Recipe
from foveate.core.roles import VISUAL
from foveate.core.signal import Seen
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.models import anatomy
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.conversation import generate, logits
from tests.suite.oracle import masked_logits, noting
from tests.suite.test_methods import double, fingerprint

BODY = BODIES["qwen3_vl_moe"]
SPARSE = (0, 2, 3, 4)
GROUPED = {
    product: lambda x, weight, *_, out_shape=None, **__: 2 * x[0] * weight[1] * weight[2]
    for product in (torch.ops.aten._grouped_mm, torch.ops.transformers.grouped_mm_fallback)
}
"""FLOPs of products that the counter does not know, by the shapes of what goes in."""
CLOSE = dict(rtol=1e-4, atol=1e-4)


@dataclass(frozen=True)
class Skip(Experts):
    """Drops the experts whose weight is below a threshold, in visual rows or everywhere."""

    below: float
    rows: str = "all"
    layers: tuple[int, ...] | None = None
    name = "skip"

    def weighed(self, traits: Traits) -> tuple[int, ...]:
        return traits.sparse if self.layers is None else self.layers

    def weigh(self, layer: int, weights: Tensor, index: Tensor, layout: Layout, seen: Seen, state: State) -> Tensor:
        assert weights.shape == index.shape == (*layout.shape, 3)
        drop = weights < self.below
        if self.rows == "visual":
            drop = drop & layout.rows(*VISUAL)[..., None]
        return weights.masked_fill(drop, 0.0)


def attach(model: Any, *methods: Any) -> foveate.Session:
    return foveate.attach(model, Recipe(tuple(m for method in methods for m in Recipe.of(method).methods)))


@contextmanager
def dense(model: Any, below: float) -> Iterator[list[Tensor]]:
    """The plain model, all chosen experts running, small weights set to zero behind the router; collects the weights."""
    weights: list[Tensor] = []

    def hook(module: Any, args: Any, output: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        weights.append(output[1].masked_fill(output[1] < below, 0.0))
        return output[0], weights[-1], output[2]

    parts = anatomy(model)
    handles = [parts.layers[layer].mlp.gate.register_forward_hook(hook) for layer in SPARSE]
    try:
        yield weights
    finally:
        for handle in handles:
            handle.remove()


def test_with_all_experts_alive_every_bit_is_the_models() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    plain = logits(generate(model, inputs, 6))
    with attach(model, Skip(below=0.0)) as session:
        assert torch.equal(logits(generate(model, inputs, 6)), plain)
    assert session.report.flops == session.report.flops_unmodified


@pytest.mark.parametrize("others", ["none", "fastv(layer=2, keep=6)", "shortv(layers=(2,)) + snapkv(keep=0.5, window=4)"])
@pytest.mark.parametrize("below", [0.3, 2.0], ids=["some", "all"])
def test_dropping_equals_weighing_zero_in_prefill_and_decode(others: str, below: float) -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    with noting() as notes, attach(model, Skip(below), others):
        output = generate(model, inputs)
    whole = BODY.extended(inputs, output.sequences[:, prompt:-1])
    with dense(model, below):
        expected = masked_logits(model, whole, notes.trace, (0,), notes)
    torch.testing.assert_close(logits(output), expected[:, prompt - 1 :], **CLOSE)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_dropped_experts_cost_nothing_under_any_implementation(experts: str) -> None:
    model, inputs = BODY.model(experts=experts), BODY.inputs(RAGGED)
    config = model.config.text_config
    with torch.no_grad(), dense(model, 0.3) as weights:
        expected = model(**inputs).logits

    with torch.no_grad(), attach(model, Skip(0.3)), FlopCounterMode(display=False, custom_mapping=GROUPED) as counter:
        output = model(**inputs).logits

    torch.testing.assert_close(output, expected, **CLOSE)
    alive = sum(int((layer > 0).sum()) for layer in weights)
    assert 0 < alive < sum(layer.numel() for layer in weights)
    spent = [sum(flops.values()) for name, flops in counter.get_flop_counts().items() if name.endswith(".mlp.experts")]
    assert sum(spent) == alive * 6 * config.hidden_size * config.moe_intermediate_size


def test_a_method_may_tell_rows_apart_and_the_report_counts_what_ran() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    with attach(model, Skip(2.0, rows="visual", layers=(2,)), "fastv(layer=3, keep=6)") as session:
        model(**inputs)
        report = session.report
    config = model.config.text_config
    expert = 6 * config.hidden_size * config.moe_intermediate_size
    with attach(model, "fastv(layer=3, keep=6)") as session:
        model(**inputs)
    assert session.report.flops - report.flops == expert * 3 * 16 * sum(images for _, images, _ in RAGGED)
    assert session.report.flops_unmodified == report.flops_unmodified


def test_several_methods_weigh_in_turn() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    with attach(model, Skip(0.4)):
        expected = logits(generate(model, inputs, 4))
    with attach(model, Skip(0.2), Skip(0.4)):
        assert torch.equal(logits(generate(model, inputs, 4)), expected)


def test_text_only_prompts_are_weighed_too() -> None:
    model, inputs = BODY.model(), BODY.inputs([(3, 0, 6), (2, 0, 9)])
    with attach(model, Skip(0.3)):
        output = generate(model, inputs, 4)
    with dense(model, 0.3):
        torch.testing.assert_close(logits(output), logits(generate(model, inputs, 4)), **CLOSE)


def test_a_sample_gets_in_a_padded_batch_what_it_gets_alone() -> None:
    model = BODY.model().double()
    with attach(model, Skip(0.3), "fastv(layer=2, keep=6)"):
        batch = logits(generate(model, double(BODY.inputs(RAGGED)), 4))
        for place in range(len(RAGGED)):
            alone = logits(generate(model, double(BODY.inputs(RAGGED, only=place)), 4))[0]
            torch.testing.assert_close(alone, batch[place], rtol=1e-6, atol=1e-6)


def test_gradients_reach_the_router_through_the_experts_that_live() -> None:
    model, inputs = BODY.model(), BODY.inputs(ONE)
    with attach(model, Skip(0.3)):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(anatomy(model).layers[layer].mlp.gate.weight.grad.abs().sum() > 0 for layer in SPARSE)


def test_detaching_restores_the_model_bit_for_bit() -> None:
    model, inputs = BODY.model(), BODY.inputs(ONE)
    plain = logits(generate(model, inputs, 4))
    before = fingerprint(model)
    with attach(model, Skip(0.3)):
        assert not torch.equal(logits(generate(model, inputs, 4)), plain)
    assert fingerprint(model) == before
    assert torch.equal(logits(generate(model, inputs, 4)), plain)


def test_a_forward_that_stands_in_for_the_experts_is_run_and_comes_back() -> None:
    model, inputs = BODY.model(), BODY.inputs(ONE)
    experts = anatomy(model).experts(0)
    original, calls = experts.forward, []
    experts.forward = lambda *args: calls.append(args[0].shape) or original(*args)
    standing_in = experts.forward
    with attach(model, Skip(0.3)):
        calls.clear()  # attaching watches a layer
        model(**inputs)
    assert len(calls) == 1
    assert experts.__dict__["forward"] is standing_in


def test_models_and_layers_without_experts_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"^skip: qwen3_vl has no experts; load a mixture-of-experts model"):
        attach(BODIES["qwen3_vl"].model(), Skip(0.3))
    with pytest.raises(FoveateError, match=r"^skip: decoder layer 1 has no experts; layers with experts: 0, 2, 3, 4$"):
        attach(BODY.model(), Skip(0.3, layers=(0, 1)))


def test_traits_say_how_many_experts_and_where() -> None:
    assert (anatomy(BODY.model()).traits().experts, anatomy(BODY.model()).traits().sparse) == (3, SPARSE)
    traits = anatomy(BODIES["qwen3_vl"].model()).traits()
    assert (traits.experts, traits.sparse) == (None, ())
