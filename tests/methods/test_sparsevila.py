"""SparseVILA: the card's examples of salience, positions and retrieval, and what a turn may read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.items import ItemBatch
from foveate.core.layout import Layout
from foveate.core.method import Entries
from foveate.core.roles import VISUAL
from foveate.core.signal import Attention, Columns, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.methods import SparseVILA
from foveate.methods.kv_cache.sparsevila import column_mean, retrieve
from foveate.ops.attention import columns, row_logits
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits

CLS = Rows(Site("encoder", 22), "cls")


class Salience:
    """An encoder signal at the sequence site: as many values as each item has tokens, of its sample's row."""

    def __init__(self, rows: Tensor, before: Layout) -> None:
        self.rows, self.before = rows, before

    def of(self, items: list[tuple[int, int]]) -> Tensor:
        sample = torch.tensor([b for b, _ in items])
        return self.rows[sample[:, None], self.before.where(items)]


def observed(logits: Tensor) -> Attention:
    return Attention(logits, logits.logsumexp(-1))


def select(signal: Signal, value: Any, k: int) -> list[list[int]]:
    count = 4
    batch = ItemBatch(
        rows=1,
        columns=count,
        ordinal=torch.arange(count)[None],
        number=(0,),
        seen={signal: value},
        x=torch.zeros(1, count, 2),
        question=torch.zeros(1, 0, 2),
        companion=(),
        seed=0,
        device=torch.device("cpu"),
    )
    return SparseVILA(keep=k).select(batch, k).tolist()


def pruned(before: Layout, keep: int | float) -> Layout:
    """With later tokens more salient."""
    salience = Salience(torch.arange(before.shape[1]).float().expand(before.shape), before)
    x = torch.zeros(*before.shape, 2)
    edit = SparseVILA(keep=keep).edit(Site("sequence"), x, before, {Columns(Site("encoder", 22)): salience}, State())
    return before if edit is None else before.after(edit)


def turn(before: Layout, logits: Tensor, earlier: Tensor | None = None, layer: int = 0) -> tuple[Entries, Seen]:
    """A turn behind entries ``earlier`` ``[B, n]`` (bool: visual), its question's logits ``[B, H, Q, K]``."""
    past = torch.zeros(before.shape[0], 0, dtype=torch.bool) if earlier is None else earlier
    visual = torch.cat([past, before.rows(*VISUAL)], dim=1)
    valid = torch.cat([torch.ones_like(past), before.valid], dim=1)
    tokens = torch.arange(visual.shape[1]).expand_as(visual).masked_fill(~valid, -1)
    signal = Rows(Site("decoder", layer), "question", keys="cache")
    entries = Entries(tokens[:, None], visual[:, None], tuple(visual.sum(1).tolist()))
    return entries, {signal: observed(logits.masked_fill(~valid[:, None, None], float("-inf")))}


def test_the_column_mean_by_hand() -> None:
    keys = torch.tensor([1.0, 1, 2, 4, 2]).log()[None, None, :, None]
    logits = row_logits(torch.tensor([1.0, -1.0])[None, :, None, None], keys.expand(1, 2, -1, -1), 1.0)
    means = column_mean(observed(logits), torch.tensor([1]))

    assert_close(observed(logits).probabilities()[0, 1, 0, 1:4], torch.tensor([0.3077, 0.1538, 0.0769]), atol=1e-4, rtol=0)
    assert_close(means[0, 1:4], torch.tensor([0.2038, 0.1769, 0.2385]), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("keep", "visual"), [(1, [3]), (2, [1, 3]), (0.34, [3]), (0.67, [1, 3])])
def test_the_hand_example_retrieves_the_best(keep: int | float, visual: list[int]) -> None:
    before = layout("t111t")
    logits = torch.tensor([[1.0, 1, 2, 4, 2], [1, 1, 0.5, 0.25, 0.5]]).log()[None, :, None]
    read = SparseVILA(decode_keep=keep).view(0, *turn(before, logits), before)

    assert read is not None
    assert read.tolist() == [[[0, *visual, 4]]]


def test_without_a_summary_token_salience_is_the_attention_received() -> None:
    attention = torch.tensor([[0.5, 0.3, 0.2], [0.2, 0.6, 0.2], [0.1, 0.5, 0.4]])
    received = columns(attention.log()[None, None], torch.eye(3)[None, None], 1.0)

    assert_close(received, torch.tensor([[0.2667, 0.4667, 0.2667]]), atol=1e-4, rtol=0)
    assert select(Columns(Site("encoder", 22)), torch.tensor([[0.2, 0.5, 0.2, 0.1]]), 2) == [[0, 1]]


def test_with_a_summary_token_salience_is_what_it_attends_to() -> None:
    row = torch.tensor([0.4, 0.1, 0.3, 0.2]).log().reshape(1, 1, 1, 4)

    assert select(CLS, Attention(row, torch.zeros(1, 1, 1)), 2) == [[0, 2]]


def test_heads_of_the_summary_token_are_averaged_after_the_softmax() -> None:
    rows = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.0, 0.9, 0.05, 0.05]]).log().reshape(1, 2, 1, 4)

    assert select(CLS, Attention(rows, torch.zeros(1, 2, 1)), 2) == [[0, 1]]


def test_one_row_of_positions_is_that_of_a_shorter_prompt() -> None:
    after = pruned(layout("t11111111t"), 0.5)

    assert after.origin.tolist() == [[0, 5, 6, 7, 8, 9]]
    assert after.positions.tolist() == [[[0, 1, 2, 3, 4, 5]]]


def test_under_m_rope_positions_are_ranks_and_text_follows() -> None:
    before = layout("t111111t")
    grid = torch.tensor([[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]])
    after = pruned(Layout.build(before.ordinal >= 0, before.valid, grid[:, None], before.items), 2)

    # two tokens of the second line: cells (1, 1) and (1, 2) of the grid
    assert after.origin.tolist() == [[0, 5, 6, 7]]
    assert after.positions[:, 0].tolist() == [[0, 1, 1, 3], [0, 1, 1, 3], [0, 1, 2, 3]]


@given(prompts(), st.floats(0.1, 1), st.data())
def test_everything_but_the_worst_visual_entries_is_read(before: Layout, keep: float, data: st.DataObject) -> None:
    logits = torch.randn(before.shape[0], 2, 1, before.shape[1], generator=generator(data))
    method = SparseVILA(decode_keep=keep)
    entries, seen = turn(before, logits)
    view = method.view(0, entries, seen, before)
    scores = column_mean(*seen.values(), before.question.sum(1).clamp(max=1))

    for sample in range(before.shape[0]):
        everything = before.valid[sample].nonzero().flatten().tolist()
        read = everything if view is None else view[sample, 0][view[sample, 0] >= 0].tolist()
        visual = before.rows(*VISUAL)[sample].nonzero().flatten().tolist()
        assert read == sorted(set(read))
        assert set(everything) - set(read) <= set(visual)
        kept = [entry for entry in visual if entry in read]
        assert len(kept) == (max(1, round(keep * len(visual))) if visual else 0)
        unread = [scores[sample, entry] for entry in visual if entry not in read]
        assert not unread or max(unread) <= min(scores[sample, entry] for entry in kept)


@given(prompts(), st.data())
def test_a_sample_reads_in_a_batch_what_it_reads_alone(before: Layout, data: st.DataObject) -> None:
    logits = torch.randn(before.shape[0], 2, 1, before.shape[1], generator=generator(data))
    method = SparseVILA(decode_keep=0.4)
    together = method.view(0, *turn(before, logits), before)

    for sample in range(before.shape[0]):
        own = slice(sample, sample + 1)
        alone = Layout.build(before.ordinal[own] >= 0, before.valid[own], before.positions[:, own], before.items[own])
        view = method.view(0, *turn(alone, logits[own]), alone)
        expected = before.valid[sample].nonzero().flatten() if view is None else view[view >= 0]
        if together is not None:
            assert together[sample][together[sample] >= 0].tolist() == expected.tolist()


def test_shorter_views_are_padded_on_the_left() -> None:
    scores = torch.arange(6.0).expand(2, -1)
    visual = torch.tensor([[False, True, True, True, True, False], [False, False, False, True, True, False]])
    valid = torch.tensor([[True] * 6, [False, False, True, True, True, True]])

    view = retrieve(scores, valid, visual, counts=(2, 1), dropped=(2, 1))
    assert view.tolist() == [[[-1, 0, 3, 4, 5]], [[-1, -1, 2, 4, 5]]]


def test_padding_rows_of_the_question_count_for_nothing() -> None:
    rows = torch.rand(1, 2, 3, 5, generator=torch.Generator().manual_seed(0)).softmax(-1)
    padded = torch.cat([torch.zeros(1, 2, 2, 5), rows], dim=2)
    attention = Attention(padded.log(), torch.zeros(1, 2, 5))

    assert_close(column_mean(attention, torch.tensor([3])), rows.mean((1, 2)))


def test_the_next_question_asks_the_whole_cache() -> None:
    method, follow_up = SparseVILA(decode_keep=1), layout("tt")
    earlier = torch.tensor([[False, True, True, True, False]])
    views = []
    for best in (1, 2):
        logits = torch.zeros(1, 1, 2, 7).index_fill(3, torch.tensor([best]), 3.0)
        views.append(method.view(0, *turn(follow_up, logits, earlier), follow_up))

    assert [None if view is None else view.tolist() for view in views] == [[[[0, 1, 4, 5, 6]]], [[[0, 2, 4, 5, 6]]]]


def test_every_layer_reads_its_own() -> None:
    method, before = SparseVILA(decode_keep=1), layout("t111t")
    reads = []
    for layer, best in ((0, 1), (1, 3)):
        logits = torch.zeros(1, 1, 1, 5).index_fill(3, torch.tensor([best]), 3.0)
        reads.append(method.view(layer, *turn(before, logits, layer=layer), before))

    assert [None if view is None else view.tolist() for view in reads] == [[[[0, 1, 4]]], [[[0, 3, 4]]]]


def test_the_whole_budget_reads_the_whole_cache() -> None:
    before = layout("t111t")

    assert SparseVILA(decode_keep=1.0).view(0, *turn(before, torch.zeros(1, 1, 1, 5)), before) is None
    assert SparseVILA(decode_keep=9).view(0, *turn(before, torch.zeros(1, 1, 1, 5)), before) is None


def test_text_alone_and_layers_that_were_not_recorded_are_left_alone() -> None:
    text, before = layout("ttt"), layout("t111t")
    entries, _ = turn(before, torch.zeros(1, 1, 1, 5))

    assert SparseVILA().view(0, *turn(text, torch.zeros(1, 1, 1, 3)), text) is None
    assert SparseVILA().view(0, entries, {}, before) is None


def test_it_reads_the_block_that_feeds_the_projector_and_the_question_in_every_layer() -> None:
    question = [Rows(Site("decoder", layer), "question", keys="cache") for layer in range(32)]

    assert SparseVILA().reads(traits()) == (CLS, *question)
    assert SparseVILA().reads(traits(has_cls=False))[0] == Columns(Site("encoder", 22))
    assert SparseVILA(encoder_layer=23).reads(traits())[0] == Rows(Site("encoder", 23), "cls")


def test_layers_without_a_full_cache_are_not_asked() -> None:
    signals = SparseVILA(keep=1.0).reads(traits(sliding=(0, 1), recurrent=tuple(range(3, 32))))

    assert signals == (Rows(Site("decoder", 2), "question", keys="cache"),)


def test_half_of_it_may_be_switched_off() -> None:
    assert SparseVILA(keep=1.0, decode_keep=1.0).reads(traits()) == ()
    assert SparseVILA(decode_keep=1.0).reads(traits()) == (CLS,)
    assert CLS not in SparseVILA(keep=1.0).reads(traits())
    assert CLS in SparseVILA(keep=1).reads(traits())  # one token, not all


def test_a_model_without_encoder_signals_may_still_retrieve() -> None:
    blind = traits(encoder_layers=None, feature_layer=None)
    reason = SparseVILA().check(blind)

    assert reason is not None
    assert "keep=1.0" in reason
    assert SparseVILA(keep=1.0).check(blind) is None


def test_an_encoder_layer_that_does_not_exist_is_refused() -> None:
    assert SparseVILA(encoder_layer=24).check(traits()) == "encoder_layer=24: must be in 0..23"
    assert SparseVILA(encoder_layer=23).check(traits()) is None


@pytest.mark.parametrize("wrong", [{"keep": 0}, {"decode_keep": 0}, {"decode_keep": 1.5}, {"encoder_layer": -1}])
def test_wrong_parameters_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=rf"sparsevila: {next(iter(wrong))}="):
        SparseVILA(**wrong)


def generator(data: st.DataObject) -> torch.Generator:
    return torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
