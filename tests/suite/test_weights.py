"""What each method that replaces weights must prove, on every anatomy that it can quantize."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError
from foveate.core.weights import Weights
from foveate.engine.linears import blocks_of, dense
from foveate.engine.quantize import quantize
from foveate.engine.shelf import block_of
from foveate.engine.stand_in import stand_in
from foveate.methods import MASQuant, QuantExperts
from foveate.models import anatomy
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import generate, logits
from tests.suite.pairs import HOSTED, parts
from tests.suite.test_methods import said_of

METHODS = list(dict.fromkeys(one.values[0] for one in HOSTED if isinstance(one.values[0], Weights)))
replacing = pytest.mark.parametrize(("method", "body"), [one for one in HOSTED if isinstance(one.values[0], Weights)])


def answered(body: Body) -> list[dict[str, torch.Tensor]]:
    """Two batches, the last three words of each prompt its answer."""
    batches = []
    for samples in (RAGGED, ONE):
        inputs = body.inputs(samples)
        labels = torch.full_like(inputs["input_ids"], -100)
        labels[:, -3:] = inputs["input_ids"][:, -3:]
        batches.append(inputs | {"labels": labels})
    return batches


@replacing
def test_what_stands_for_linears_is_what_was_placed_and_goes_without_a_trace(method: Weights, body: Body) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    before, plain = copy.deepcopy(model.state_dict()), logits(generate(model, inputs, 4))
    kept = {name: sorted(map(str, vars(module))) for name, module in model.named_modules()}
    artifact = quantize(model, method, answered(body))
    assert {name: sorted(map(str, vars(module))) for name, module in model.named_modules()} == kept
    with foveate.attach(model, method, artifacts=[artifact]):
        made = logits(generate(model, inputs, 4))
    assert all(torch.equal(one, before[name]) for name, one in model.state_dict().items())
    assert torch.equal(logits(generate(model, inputs, 4)), plain)

    blocks = blocks_of(anatomy(model), method.part)
    for number, block in enumerate(blocks):
        found = block_of(artifact, number)
        assert set(found) == {name for name, part in block.named_modules() if type(part) is torch.nn.Linear}
        for replaced in found.values():
            assert replaced.grid.bits == method.bits
            assert 0 <= int(replaced.integers.max()) - int(replaced.integers.min()) < 2**method.bits
            assert replaced.grid.scale.isfinite().all()
            assert replaced.grid.scale.min() > 0
    with spelled_out(model, method, artifact):
        torch.testing.assert_close(logits(generate(model, inputs, 4)), made, **exactly(method))
    assert made.isfinite().all()
    darker = {name: value / 2 if value.is_floating_point() else value for name, value in inputs.items()}
    if method.part == "encoder" and torch.equal(logits(generate(model, darker, 4)), plain):
        pytest.skip("fresh models of this family make nothing of pictures")
    assert not torch.allclose(made, plain, rtol=1e-6, atol=1e-6)


def exactly(method: Weights) -> dict[str, float]:
    """To the last bit, unless products of low rank are made of other rows together."""
    return {"rtol": 1e-5, "atol": 1e-5} if isinstance(method, MASQuant | QuantExperts) else {"rtol": 0, "atol": 0}


@contextmanager
def spelled_out(model: Any, method: Weights, artifact: foveate.Artifact) -> Iterator[None]:
    """Every weight as floats, without any packing and without a session; rows are what the ids that come in say."""
    parts = anatomy(model)

    def say(original: Any, *args: Any, **kwargs: Any) -> Any:
        ids = kwargs["input_ids"]
        with said_of(ids, parts):
            return original(*args, **kwargs)

    undo = [stand_in(parts.multimodal, "forward", say)]
    for number, block in enumerate(blocks_of(anatomy(model), method.part)):
        for name, replaced in block_of(artifact, number).items():
            linear = block.get_submodule(name)
            assert isinstance(linear, torch.nn.Linear)
            stand = dense(replaced, linear)
            undo.append(stand_in(linear, "forward", lambda stand, original, x: stand(x), stand))
    try:
        yield
    finally:
        for each in undo:
            each()


@pytest.mark.slow
@replacing
def test_what_is_made_does_not_depend_on_how_samples_are_batched(method: Weights, body: Body) -> None:
    if body.name not in ("llava-clip", "qwen3_vl"):
        pytest.skip("two families with and without what is added between layers")
    model = body.model().double()
    whole = _doubled(body.inputs(RAGGED))
    apart = [_doubled(body.inputs(RAGGED, only=place)) for place in range(len(RAGGED))]
    one, other = (quantize(model, method, batches) for batches in ([whole], apart[::-1]))
    off = total = 0
    for number in range(parts(body).traits().decoder_layers):
        for mine, theirs in zip(block_of(one, number).values(), block_of(other, number).values(), strict=True):
            off += int((mine.integers != theirs.integers).sum())
            total += mine.integers.numel()
    assert off <= 0.01 * total  # sums are rounded in another order


def _doubled(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("method", [method for method in METHODS if method.part == "decoder"], ids=str)
def test_experts_are_refused_by_name(method: Weights) -> None:
    body = BODIES["qwen3_vl_moe"]
    with pytest.raises(FoveateError, match=rf"{method.name}: decoder layer 0 has experts"):
        quantize(body.model(), method, [body.inputs(ONE)])
