"""What a compressed cache must survive, under every method that owns one: copies, files, beams, samples that are chosen,
tokens that are taken back; and that it holds as many bytes as it says.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.method import Cache, Method
from foveate.engine.cache import FoveateLayer
from foveate.engine.ledger import Ledger
from foveate.engine.session import Session
from foveate.methods import AttentionPack
from foveate.ops.ragged import Blocks
from tests import tiny
from tests.suite.bodies import BODIES, RAGGED, Body
from tests.suite.conversation import fed_lengths, generate, logits
from tests.suite.pairs import artifacts, lent, parts, refusal, variants

LLAVA = BODIES["llava-clip"]
TWO = [(3, 1, 6), (2, 1, 4)]
CLOSE = dict(rtol=1e-4, atol=1e-4)


def owners() -> Iterator[Any]:
    """Every method that owns the cache, in its first setting on LLaVA; in all, and on two others, in the second tier."""
    for name in registry.methods():
        for number, method in enumerate(variants(name)):
            for body in (LLAVA, BODIES["qwen2_5_vl"], BODIES["gemma3"]):
                if isinstance(method, Cache) and refusal(method, body) is None and (body is LLAVA or number == 0):
                    marks = [] if body is LLAVA and number == 0 else [pytest.mark.slow]
                    yield pytest.param(method, body, id=f"{body.name}-{method}", marks=marks)


every = pytest.mark.parametrize(("method", "body"), [*owners()])


def saved(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "copied": copy.deepcopy,
    "pickled": lambda cache: pickle.loads(pickle.dumps(cache)),
    "saved": saved,
}


@every
@pytest.mark.parametrize("way", WAYS)
def test_a_copy_goes_on_under_another_session_as_the_cache_does(method: Method, body: Body, way: str) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    question = torch.randint(11, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(7))
    with attach(model, method, body):
        first = generate(model, inputs, 4)
        twin = WAYS[way](first.past_key_values)
        whole = body.extended(inputs, torch.cat([first.sequences[:, prompt:], question], dim=1))
        turn = body.without_pictures(whole)
        expected = generate(model, turn, 6, past_key_values=first.past_key_values)
    assert sizes(twin) != sizes(first.past_key_values)  # which has gone on, alone
    other = body.model()
    if getattr(model.model, "rope_deltas", None) is not None:  # which is remembered in the model, not in the cache
        other.model.rope_deltas = model.model.rope_deltas
    with attach(other, method, body), fed_lengths(other) as fed:
        found = generate(other, turn, 6, past_key_values=twin)
    assert fed == [1 + 5, *[1] * 5]
    assert torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(logits(found), logits(expected), rtol=1e-6, atol=1e-6)
    assert sizes(twin) == sizes(first.past_key_values)


@every
def test_a_saved_cache_is_refused_without_a_session_or_goes_on_as_it_is(method: Method, body: Body) -> None:
    model, inputs = body.model(), body.inputs(TWO)
    with torch.no_grad(), attach(model, method, body):
        cache = saved(model(**inputs, use_cache=True).past_key_values)
    mask = torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with pytest.raises(
        FoveateError, match="past_key_values: this cache was compressed under a Foveate session that has ended"
    ):
        model(input_ids=torch.tensor([[20], [30]]), attention_mask=mask, past_key_values=cache)


@every
def test_beams_score_what_their_answers_score_one_by_one(method: Method, body: Body) -> None:
    model, inputs = body.model(), body.inputs(TWO)
    prompt = inputs["input_ids"].shape[1]
    with attach(model, method, body):
        output = generate(model, inputs, 6, num_beams=3, num_return_sequences=3, output_scores=True)
        answers = output.sequences[:, prompt:]
        told = torch.stack([forced(model, inputs, answers[place::3]) for place in range(3)], dim=1).flatten(0, 1)
    score = told.log_softmax(-1).gather(2, answers[..., None])[..., 0].mean(1)
    torch.testing.assert_close(output.sequences_scores, score, **CLOSE)


@every
@pytest.mark.parametrize("index", [[1, 1, 0], [0], [0, 0, 1, 1]], ids=["selected", "one", "repeated"])
def test_what_is_held_follows_the_samples(method: Method, body: Body, index: list[int]) -> None:
    refuse_m_rope(body)
    model, inputs, words = body.model(), body.inputs(TWO), torch.arange(20, 32).reshape(2, 6)

    def told(samples: list[int]) -> Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        if samples == [0, 0, 1, 1]:
            cache.batch_repeat_interleave(2)
        elif samples != [0, 1]:
            cache.batch_select_indices(torch.tensor(samples))
        mask, outputs = inputs["attention_mask"][samples], []
        for ids in words[samples].split([1, 1, 1, 3], dim=1):  # steps of decoding, then a turn
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            outputs.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(outputs, dim=1)

    with torch.no_grad(), attach(model, method, body):
        torch.testing.assert_close(told(index), told([0, 1])[index], **CLOSE)


@every
def test_tokens_that_were_taken_back_were_never_there(method: Method, body: Body) -> None:
    refuse_m_rope(body)
    if isinstance(method, Cache) and method.stepwise:
        pytest.skip("what a step of decoding has evicted cannot be taken back")
    if isinstance(method, AttentionPack):
        method = replace(method, grouping="prompt")  # steps that are taken back have moved importance
    model, inputs, words = body.model(), body.inputs(TWO), torch.arange(20, 32).reshape(2, 6)

    def told(*, tried: bool) -> Tensor:
        cache, outputs = model(**inputs, use_cache=True).past_key_values, []
        for layer in cache.layers:
            layer.activate_past_recording()
        mask = inputs["attention_mask"]
        for step, ids in enumerate(words.split([1, 1, 1, 1, 2], dim=1)):
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            given = dict(attention_mask=mask, past_key_values=cache)
            if tried and step in (1, 2):
                model(input_ids=ids.flip(0) + 30, **given)
                cache.crop(-ids.shape[1])
            outputs.append(model(input_ids=ids, **given).logits)
        return torch.cat(outputs, dim=1)

    with torch.no_grad(), attach(model, method, body):
        torch.testing.assert_close(told(tried=True), told(tried=False), **CLOSE)


@every
def test_the_prompt_itself_cannot_be_taken_back(method: Method, body: Body) -> None:
    model, inputs = body.model(), body.inputs(TWO)
    with torch.no_grad(), attach(model, method, body):
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(
            FoveateError, match=r"crop\(3\): only the \d+ tokens after the compressed prompt can be taken back"
        ):
            cache.crop(-3)


@pytest.mark.parametrize(
    "method",
    [m for name in registry.methods() for m in variants(name) if isinstance(m, Cache) and refusal(m, LLAVA) is None],
    ids=str,
)
def test_as_many_bytes_are_held_as_the_report_says(method: Method) -> None:
    model, ids = tiny.llava(grid=12), torch.tensor([[1, *[tiny.IMAGE] * 144, *range(20, 60)]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 96, 96)}
    with torch.no_grad(), foveate.attach(model, method, artifacts=lent(LLAVA, model)) as session:
        cache = model(**inputs, use_cache=True).past_key_values
        told = session.report.kv_bytes
    assert told == tuple(layer.nbytes for layer in cache.layers)
    for layer in cache.layers:
        # Blocks say what keys and values take.
        beside = 0 if not isinstance(layer.store, Blocks) else bytes_of((layer.store.there, layer.store.owner), {})
        assert layer.nbytes == bytes_of(vars(layer), {}) - beside
    whole = 4 * 2 * 2 * 12 * 4 * ids.numel()  # of four layers, keys and values of two heads of twelve floats
    views = type(method).view is not Cache.view
    assert sum(told) < (2 if views else 1) * whole
    assert views or sum(told) < 0.75 * whole


def bytes_of(of: Any, known: dict[int, Any]) -> int:
    """Bytes of all tensors within, once each; what says which tokens they are of is no part of it."""
    if isinstance(of, Tensor):
        fresh = of.numel() and known.setdefault(of.untyped_storage().data_ptr(), of) is of
        return of.untyped_storage().nbytes() if fresh else 0
    if isinstance(of, Ledger):
        return 0
    if is_dataclass(of):
        of = [getattr(of, field.name) for field in fields(of)]
    if isinstance(of, dict):
        of = list(of.values())
    return sum(bytes_of(part, known) for part in of) if isinstance(of, list | tuple) else 0


def sizes(cache: Any) -> list[Any]:
    """Bytes and tokens of each layer."""
    return [(layer.nbytes, layer.get_seq_length()) for layer in cache.layers if isinstance(layer, FoveateLayer)]


def forced(model: Any, inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
    """Logits ``[B, n, V]`` of a conversation in which ``answers`` ``[B, n]`` are given token by token."""
    prompt = inputs["input_ids"].shape[1]

    def only(sample: int, ids: Tensor) -> list[int]:
        return [int(answers[sample, len(ids) - prompt])]

    return logits(generate(model, inputs, answers.shape[1], prefix_allowed_tokens_fn=only))


def refuse_m_rope(body: Body) -> None:
    if parts(body).rotary_rows > 1:
        pytest.skip("transformers cannot go on with a batch of these families in a loop of one's own, recipe or not")


def attach(model: Any, method: Method, body: Body) -> Session:
    """With what the method needs on this body."""
    return foveate.attach(model, method, artifacts=artifacts(body))
