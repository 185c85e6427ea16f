"""MixKV: the card's hand example, its limits, and the budgets of its three hosts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.signal import Attention, KeyValue, Numbers, Rows, Seen, Signal, Site
from foveate.methods import MixKV, SnapKV
from foveate.methods.kv_cache.mixkv import (
    head_capacities,
    key_geometry,
    mixed_scores,
    ragged_entries,
    rescaled,
)
from foveate.ops.select import top_k
from tests.methods.bodiless import layout, traits

ALL = torch.ones(1, 4, dtype=torch.bool)
KEYS = torch.tensor([[[[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]]])
ATTENTION = torch.tensor([[[0.4, 0.3, 0.2, 0.1]]])
VALUES = torch.tensor([[[[3.0], [1.0], [2.0], [2.0]]]])
"""The card's example: one head, four entries, no window."""


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_geometry_of_the_hand_example() -> None:
    similarity, redundancy = key_geometry(KEYS, ALL)

    assert_close(similarity, torch.tensor([[[0.75, 0.75, 0.75, 0.25]]]))
    assert_close(redundancy, torch.tensor([[[0.5]]]))


def test_the_parts_of_the_hand_example() -> None:
    assert_close(rescaled(VALUES[..., 0], ATTENTION, ALL), torch.tensor([[[0.5, 0.0, 0.25, 0.25]]]))
    assert_close(rescaled(-key_geometry(KEYS, ALL)[0], ATTENTION, ALL), torch.tensor([[[0.0, 0.0, 0.0, 1.0]]]))


def test_the_mixture_of_the_hand_example() -> None:
    mixed = mixed_scores(ATTENTION, KEYS, VALUES, ALL, ALL)
    importance = mixed_scores(ATTENTION, KEYS, VALUES, ALL, ALL, torch.zeros(1, 1))

    assert_close(mixed, torch.tensor([[[0.45, 0.15, 0.225, 0.675]]]))
    assert top_k(mixed, 2).tolist() == [[[3, 0]]]
    assert top_k(importance, 2).tolist() == [[[0, 2]]]
    assert top_k(ATTENTION, 2).tolist() == [[[0, 1]]]


@given(st.integers(2, 9), st.integers(0, 3), st.integers(0, 99))
def test_redundancy_is_the_mean_cosine_of_two_different_keys(entries: int, padding: int, seed: int) -> None:
    keys = drawn(2, 3, padding + entries, 4, seed=seed) + 1
    valid = (torch.arange(padding + entries) >= padding).expand(2, -1)
    unit = torch.nn.functional.normalize(keys[:, :, padding:], dim=-1)
    cosines = unit @ unit.mT
    off_diagonal = (cosines.sum((-1, -2)) - entries) / (entries * (entries - 1))

    assert_close(key_geometry(keys, valid)[1][..., 0], off_diagonal.clamp(0, 1), atol=1e-5, rtol=1e-4)


def test_equal_keys_are_wholly_redundant_and_rank_in_their_order() -> None:
    keys = torch.ones(1, 1, 4, 2)
    mixed = mixed_scores(ATTENTION, keys, VALUES, ALL, ALL)

    assert_close(key_geometry(keys, ALL)[1], torch.ones(1, 1, 1))
    assert top_k(mixed.round(decimals=5), 4).tolist() == [[[0, 1, 2, 3]]]


def test_orthogonal_keys_leave_importance_alone() -> None:
    keys = torch.eye(4)[None, None]

    assert_close(key_geometry(keys, ALL)[1], torch.zeros(1, 1, 1))
    assert_close(mixed_scores(ATTENTION, keys, VALUES, ALL, ALL), ATTENTION + torch.tensor([[[0.5, 0.0, 0.25, 0.25]]]))


@given(st.integers(0, 99))
def test_the_length_of_keys_does_not_matter(seed: int) -> None:
    keys, scale = drawn(1, 2, 4, 3, seed=seed), drawn(1, 2, 4, 1, seed=seed + 1).abs() + 0.1
    attention, values = ATTENTION.expand(1, 2, -1), drawn(1, 2, 4, 3, seed=seed + 2)

    assert_close(
        mixed_scores(attention, keys * scale, values, ALL, ALL),
        mixed_scores(attention, keys, values, ALL, ALL),
        atol=1e-5,
        rtol=1e-4,
    )


def test_constant_value_norms_add_nothing() -> None:
    assert_close(rescaled(torch.full((1, 1, 4), 2.0), ATTENTION, ALL), torch.zeros(1, 1, 4))


def scored(method: MixKV, prompts: Layout, *, seed: int = 0, numbers: Any = None, layer: int = 0) -> Tensor | None:
    """Scores of a layer with four query heads and two key-value heads; the same rows from the end, whatever the padding."""
    batch, rows = prompts.shape
    logits = drawn(batch, 4, method.window, 40, seed=seed)[..., -rows:]
    logits = logits.masked_fill(~prompts.valid[:, None, None], float("-inf"))
    keys, values = (drawn(batch, 2, 40, 4, seed=seed + n)[:, :, -rows:] for n in (1, 2))
    seen = {
        Rows(Site("decoder", layer), method.window, keys="cache"): Attention(logits, logits.logsumexp(-1)),
        Numbers("mixkv"): numbers,
    }
    return method.score(layer, keys, values, seen, prompts)


def kept(method: MixKV, prompts: Layout, layers: int = 1, **settings: Any) -> list[Kept | None]:
    return method.plan([scored(method, prompts, **settings)] * layers, [prompts] * layers)


@given(st.integers(1, 20), st.sampled_from(["snapkv", "adakv"]), st.integers(0, 9))
def test_the_window_stays_and_the_budget_is_met(keep: int, host: Any, seed: int) -> None:
    method, prompt = MixKV(keep=keep, window=4, host=host), layout("t" * 20)
    (found,) = kept(method, prompt, seed=seed)
    if keep == 20:
        assert found is None
        return
    assert found is not None
    heads = [[entry for entry in head if entry >= 0] for head in found.entries[0].tolist()]

    assert all(set(range(20 - min(keep, 4), 20)) <= set(head) for head in heads)
    assert all(head == sorted(set(head)) for head in heads)
    if host == "snapkv":
        assert {len(head) for head in heads} == {keep}
    else:
        assert found.by_head is not None
        assert abs(sum(map(len, heads)) - 2 * keep) <= 2


@given(st.sampled_from(["snapkv", "pyramidkv", "adakv"]), st.integers(0, 6), st.integers(0, 9))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(host: Any, padding: int, seed: int) -> None:
    method = MixKV(keep=0.5, window=4, host=host)
    length = 20 - padding
    batch, alone = layout("." * padding + "t" * length, "t" * 20), layout("t" * length)
    together, single = kept(method, batch, layers=3, seed=seed), kept(method, alone, layers=3, seed=seed)

    def entries(found: Kept | None) -> list[list[int]]:
        assert found is not None
        return [[entry for entry in head if entry >= 0] for head in found.entries[0].tolist()]

    for padded, plain in zip(together, single):
        assert entries(padded) == [[entry + padding for entry in head] for head in entries(plain)]


def test_a_prompt_that_fits_into_the_window_stays_whole_beside_a_longer_one() -> None:
    method, prompts = MixKV(keep=0.5, window=4), layout("....ttt", "ttttttt")
    (found,) = kept(method, prompts)
    assert found is not None

    assert found.entries[0].tolist() == [[4, 5, 6]] * 2
    assert kept(method, layout("ttt")) == [None]


def test_without_redundancy_and_values_it_is_snapkv() -> None:
    prompt, settings = layout("t" * 20), dict(keep=0.5, window=4)
    logits = drawn(1, 4, 4, 20, seed=3)
    seen = {
        Rows(Site("decoder", 0), 4, keys="cache"): Attention(logits, logits.logsumexp(-1)),
        Numbers("mixkv"): {"redundancy": torch.zeros(1, 2)},
    }
    keys, constant = drawn(1, 2, 20, 4, seed=4), torch.ones(1, 2, 20, 4)
    ours, host = MixKV(**settings, redundancy="table"), SnapKV(**settings)  # type: ignore[arg-type]
    plans = [method.plan([method.score(0, keys, constant, seen, prompt)], [prompt]) for method in (ours, host)]

    assert plans[0][0] is not None
    assert plans[1][0] is not None
    assert plans[0][0].entries.tolist() == plans[1][0].entries.tolist()


def test_deeper_layers_keep_less_under_pyramidkv() -> None:
    plans = kept(MixKV(keep=0.4, window=4, host="pyramidkv"), layout("t" * 40), layers=4)

    assert [plan.entries.shape[-1] for plan in plans if plan] == [4 + 24, 4 + 16, 4 + 8, 4]


def test_the_concentrated_head_gets_more_under_adakv() -> None:
    attention = torch.tensor([[[8.0, 7.0, 6.0, 5.0], [1.0, 1.0, 1.0, 0.5]]])

    assert head_capacities(attention, ALL, [2], floor=0.0, normalise=False).tolist() == [[4, 0]]
    assert head_capacities(attention, ALL, [2], floor=0.5, normalise=False).tolist() == [[3, 1]]
    assert head_capacities(attention, ALL, [4], floor=0.2, normalise=True).tolist() == [[4, 4]]


def test_ragged_entries_are_padded_on_the_left() -> None:
    scores = torch.tensor([[[0.1, 0.9, 0.5], [0.3, 0.2, 0.1]]])

    assert ragged_entries(scores, torch.tensor([[2, 1]])).tolist() == [[[-1, 1, 2], [-1, -1, 0]]]


class Call:
    """Keys of two prompts, a `ModelCall`."""

    traits = traits(Fingerprint("llava", 3, 8, 64), recurrent=(1,))

    def __init__(self) -> None:
        self.keys = {layer: drawn(2, 2, 5, 4, seed=layer) + 1 for layer in (0, 2)}

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        known = {KeyValue(Site("decoder", layer)): (keys, keys) for layer, keys in self.keys.items()}
        yield layout("ttttt", "..ttt"), {signal: known[signal] for signal in signals}


def test_the_table_is_the_mean_over_samples() -> None:
    call = Call()
    table = MixKV().calibrate(call)["redundancy"]  # type: ignore[arg-type]
    valid = layout("ttttt", "..ttt").valid

    assert table.shape == (3, 2)
    assert_close(table[2], key_geometry(call.keys[2], valid)[1][..., 0].mean(0))
    assert table[1].tolist() == [0, 0]


def test_a_table_is_read_where_it_is_asked_for() -> None:
    method, prompt = MixKV(keep=0.5, window=4, redundancy="table"), layout("t" * 20)
    table = {"redundancy": torch.tensor([[0.0, 0.0], [1.0, 1.0]])}
    plain = scored(method, prompt, numbers=table)
    diverse = scored(method, prompt, numbers=table, layer=1)
    assert plain is not None
    assert diverse is not None

    assert Numbers("mixkv") in method.reads(traits())
    assert torch.equal(plain[0], diverse[0])
    assert not torch.equal(plain[1], diverse[1])


def test_a_table_that_is_not_there_is_refused() -> None:
    small = Fingerprint("llava", 3, 8, 64)
    there = {"mixkv": Artifact("mixkv", small, {})}

    assert "foveate calibrate mixkv" in str(MixKV(redundancy="table").check(traits()))
    assert MixKV(redundancy="table").check(traits(small, artifacts=there)) is None
    assert MixKV().check(traits()) is None


def test_it_reads_the_window_in_every_layer_with_attention() -> None:
    assert MixKV(window=8).reads(traits(Fingerprint("llava", 3, 8, 64), recurrent=(1,))) == (
        Rows(Site("decoder", 0), 8, keys="cache"),
        Rows(Site("decoder", 2), 8, keys="cache"),
    )


@pytest.mark.parametrize(
    ("parameter", "value"),
    [
        ("keep", 0),
        ("host", "sparsemm"),
        ("window", 0),
        ("kernel", 4),
        ("pooling", "sum"),
        ("redundancy", "off"),
        ("beta", 0),
        ("floor", 2),
    ],
)
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"mixkv: {parameter}="):
        MixKV(**{parameter: value})
