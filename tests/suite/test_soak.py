"""Many conversations of several turns over compressed caches: nothing of one stays behind when it ends.

Under a method that keeps the whole cache and only chooses what each turn reads, the next turn finds all of it.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core import registry
from foveate.core.method import Cache, Method
from foveate.methods import SparseVILA
from tests import tiny
from tests.suite.bodies import BODIES
from tests.suite.conversation import generate
from tests.suite.pairs import lent, refusal, variants

BODY = BODIES["llava-clip"]
TURNS, WORDS = 5, 6


def owners() -> Iterator[Any]:
    """Every method that owns the cache; one of them in the first tier."""
    for name in registry.methods():
        method = variants(name)[0]
        if isinstance(method, Cache) and refusal(method, BODY) is None:
            yield pytest.param(method, id=name, marks=[] if name == "snapkv" else [pytest.mark.slow])


def converse(model: Any, seed: int, turns: int = TURNS) -> Tensor:
    """The ids of a conversation of so many turns about a picture."""
    generator = torch.Generator().manual_seed(seed)
    inputs: dict[str, Any] = BODY.inputs([(3, 1, 6)], seed=seed)
    past = None
    for _ in range(turns):
        output = generate(model, inputs, 4, past_key_values=past)
        past = output.past_key_values
        said = torch.randint(11, tiny.VOCABULARY, (1, WORDS), generator=generator)
        ids = torch.cat([output.sequences, said], dim=1)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return output.sequences


def alive() -> Counter[str]:
    """Tensors by shape, and objects of ours by kind."""
    gc.collect()
    found = Counter[str]()
    for each in gc.get_objects():
        kind = type(each)
        if kind is Tensor:
            found[f"tensor {tuple(each.shape)}"] += 1
        elif str(kind.__module__).startswith("foveate.engine"):
            found[kind.__qualname__] += 1
    return found


@pytest.mark.parametrize("method", owners())
def test_conversations_leave_nothing_behind(method: Method, request: pytest.FixtureRequest) -> None:
    slow = any(mark.name == "slow" for mark in request.node.iter_markers())
    model = BODY.model()
    with torch.no_grad(), foveate.attach(model, method, artifacts=lent(BODY, model)):
        for seed in range(3):
            converse(model, seed)
        before = alive()
        for seed in range(200 if slow else 8):
            converse(model, seed % 7)
        after = alive()

    assert {kind: count for kind, count in (after - before).items() if count > 2} == {}


def test_where_all_stays_every_turn_is_answered_as_in_a_fresh_conversation() -> None:
    model = BODY.model()
    with torch.no_grad():
        for seed in range(5):
            with foveate.attach(model, SparseVILA(keep=1.0, decode_keep=1.0)):
                under = converse(model, seed)
            assert torch.equal(under, converse(model, seed))


def test_what_a_turn_did_not_read_is_there_for_the_next() -> None:
    """Turns of other words before it do not change what a turn that reads everything is answered."""
    model = BODY.model()
    inputs = BODY.inputs([(3, 1, 6)])
    said = torch.randint(11, tiny.VOCABULARY, (1, WORDS), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with foveate.attach(model, SparseVILA(keep=1.0, decode_keep=0.25)) as session:
            first = generate(model, inputs, 4)
            cache = first.past_key_values
            read = [layer.held for layer in cache.layers]
            ids = torch.cat([first.sequences, said], dim=1)
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, 1, past_key_values=cache)
            whole = [layer.whole.past for layer in cache.layers]
        assert session.report.kv_bytes
    assert all(held < past for held, past in zip(read, whole))
    assert set(whole) == {ids.shape[1]}
