"""AttentionPack: which entries go where, that a full rank loses nothing, and how ranks follow attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Packed
from foveate.core.signal import Attention, Function, Rows, Seen, Site
from foveate.methods import AttentionPack
from foveate.ops.lowrank import LowRank
from tests.methods.bodiless import layout, traits
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits

WHOLE: dict[str, Any] = dict(shares=(1.0,), ranks=(1.0,))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unturned(x: Tensor, positions: Tensor) -> Tensor:
    return x


def seen(before: Layout, rows: Tensor | None = None) -> Seen:
    """The last row's logits ``[B, n]`` of one head."""
    logits = torch.zeros(before.shape) if rows is None else rows
    logits = logits.masked_fill(~before.valid, float("-inf"))[:, None, None]
    shown = Attention(logits, logits.logsumexp(-1))
    return {Function("unrotate", 0): unturned, Rows(Site("decoder", 0), 1, keys="cache"): shown}


def packed(method: AttentionPack, before: Layout, rows: Tensor | None = None) -> tuple[Packed, LowRank, Tensor, Tensor]:
    keys, values = (random(before.shape[0], 2, before.shape[1], 6, seed=n) for n in (0, 1))
    made = method.pack(0, keys, values, seen(before, rows), before)
    assert made is not None
    assert isinstance(made.store, LowRank)
    return made, made.store, keys, values


def test_visual_entries_are_packed_and_text_stays_exact() -> None:
    made, *_ = packed(AttentionPack(rank=2), layout("tt111t", "..t11t"))

    assert made.entries.tolist() == [[[2, 3, 4]], [[-1, 3, 4]]]
    assert made.rest.tolist() == [[[0, 1, 5]], [[-1, 2, 5]]]
    assert made.counts == (3, 2)
    assert made.store.held == 2.5


def test_a_prompt_without_pictures_is_left_alone() -> None:
    before = layout("tttt")

    assert AttentionPack().pack(0, random(1, 2, 4, 6), random(1, 2, 4, 6), seen(before), before) is None


def test_a_full_rank_loses_nothing() -> None:
    made, store, keys, values = packed(AttentionPack(**WHOLE), layout("tt1111t", ".t11t22"))
    rebuilt = store.rebuilt(unturned)

    for sample in range(2):
        there = made.entries[sample, 0] >= 0
        where = made.entries[sample, 0][there]
        assert_close(rebuilt[0][sample][:, there], keys[sample][:, where], atol=1e-5, rtol=0)
        assert_close(rebuilt[1][sample][:, there], values[sample][:, where], atol=1e-5, rtol=0)


def test_keys_are_decomposed_as_they_were_before_their_rotation() -> None:
    before, asked = layout("t11t"), list[Tensor]()

    def halved(x: Tensor, positions: Tensor) -> Tensor:
        asked.append(positions)
        return x / 2

    keys = random(1, 2, 4, 6)
    made = AttentionPack(**WHOLE).pack(0, keys, keys, {Function("unrotate", 0): halved}, before)
    assert made is not None
    (store,) = [made.store]
    assert isinstance(store, LowRank)

    assert asked[0].tolist() == [[[1, 2]]]
    assert store.positions.tolist() == [[[1, 2]]]
    assert_close(store.rebuilt(unturned)[0], keys[:, :, 1:3] / 2, atol=1e-5, rtol=0)
    assert_close(store.rebuilt(lambda x, positions: x * 2)[0], keys[:, :, 1:3], atol=1e-5, rtol=0)


def test_ranks_and_shares_are_those_of_the_paper() -> None:
    before = layout("t" + "1" * 100 + "t")
    rows = torch.linspace(0, 3, 102)[None]  # later ones more
    _, store, *_ = packed(AttentionPack(rank=8), before, rows)
    assert store.tiers is not None
    kept = (store.tiers.cut(torch.ones(1, 100, 8)) != 0).sum(-1)[0]

    assert store.tiers.ranks == (8, 2)
    assert kept.tolist() == [2] * 75 + [8] * 25
    assert (store.keys[0].shape[2], store.values[0].shape[2]) == (8, 8)


def test_keys_and_values_have_ranks_of_their_own() -> None:
    _, store, *_ = packed(AttentionPack(rank=6, value_rank=3, **WHOLE), layout("t" + "1" * 20 + "t"))

    assert (store.keys[0].shape[2], store.values[0].shape[2]) == (6, 3)
    assert store.tiers is None


def test_a_step_moves_importance_and_the_next_one_reads_by_it() -> None:
    before = layout("t1111t")
    rows = torch.tensor([[0.0, 3, 0, 0, 0, 0]])
    method = AttentionPack(rank=4, shares=(0.25, 0.75), ranks=(1.0, 0.25))
    found = {}
    for grouping in ("steps", "prompt"):
        _, store, *_ = packed(AttentionPack(**{**vars(method), "grouping": grouping}), before, rows)
        assert store.tiers is not None
        first = store.tiers.order[:, :1].tolist()
        # A query that asks for the last entry alone.
        query = store.rebuilt(unturned)[0][:, :, 3:] * 10
        store.attend(query, random(1, 2, 1, 6) * 0, random(1, 2, 1, 6), None, 1.0, unturned)
        found[grouping] = first, store.tiers.order[:, :1].tolist()

    assert found == {"steps": ([[0]], [[3]]), "prompt": ([[0]], [[0]])}


def test_several_tokens_at_once_leave_importance_alone() -> None:
    _, store, *_ = packed(AttentionPack(rank=4), layout("t1111t"))
    assert store.tiers is not None
    before = store.tiers.importance
    store.attend(random(1, 2, 3, 6), random(1, 2, 3, 6), random(1, 2, 3, 6), None, 1.0, unturned)

    assert store.tiers.importance is before


def test_short_prompts_are_left_alone_where_the_code_leaves_them() -> None:
    made, *_ = packed(AttentionPack(rank=2, least=6), layout("tt111t", "..t11t"))

    assert made.entries.tolist() == [[[2, 3, 4]], [[-1, -1, -1]]]
    assert made.rest.tolist() == [[[-1, 0, 1, 5]], [[2, 3, 4, 5]]]
    assert made.counts == (3, 4)
    assert AttentionPack(least=7).pack(0, random(2, 2, 6, 6), random(2, 2, 6, 6), {}, layout("tt111t", "..t11t")) is None


def test_no_attention_is_asked_for_where_nothing_goes_by_it() -> None:
    whole, tiered = AttentionPack(**WHOLE).reads(traits()), AttentionPack().reads(traits())

    assert {type(signal) for signal in whole} == {Function}
    assert sum(isinstance(signal, Rows) for signal in tiered) == 32


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"shares": (0.5, 0.4)}, r"attentionpack: shares=\(0.5, 0.4\): must add up to 1, such as \(0.25, 0.75\)"),
        ({"ranks": (1.0,)}, r"ranks=\(1.0,\): must be 2 falling parts of the rank, the first 1, as many as shares"),
        ({"ranks": (0.5, 1.0)}, r"ranks=\(0.5, 1.0\): must be 2 falling"),
        ({"ranks": (1.0, 0.0)}, r"ranks=\(1.0, 0.0\): must be 2 falling"),
        ({"rank": 0}, r"rank=0: must be an integer, 1 or more"),
        ({"weight": 0.0}, r"weight=0.0: must be a number, in \[0.01, 1\]"),
    ],
)
def test_what_makes_no_sense_is_refused(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        AttentionPack(**parameters)


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl", "gemma3"])
def test_the_better_the_rank_the_nearer_the_answer(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    plain = logits(generate(model, inputs, 4))
    errors = []
    for rank in (1, 4, 8, 64):
        with foveate.attach(model, AttentionPack(rank=rank, **WHOLE)):
            errors.append((logits(generate(model, inputs, 4))[:, 1] - plain[:, 1]).norm().item())

    assert errors[0] > errors[1] > errors[2] > errors[3]
    assert errors[3] < 1e-4
