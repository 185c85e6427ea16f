"""FastV: the card's hand example and invariants."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.roles import VISUAL
from foveate.core.signal import Attention, Columns, Rows, Site
from foveate.core.state import State
from foveate.methods import FastV
from foveate.methods.in_llm.fastv import last_row_scores
from foveate.ops.select import top_rows
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits

ROW = torch.tensor([[0.30, 0.05, 0.02, 0.20, 0.10, 0.08, 0.15, 0.10]])
"""Last-row head mean of the card's example: two text rows, four image tokens, two text rows."""


def observed(scores: Tensor) -> Attention:
    """Rows whose softmax is ``scores`` ``[B, K]``, of one head and one query."""
    return Attention(scores[:, None, None].log(), torch.zeros(len(scores), 1, 1))


def edit(method: FastV, before: Layout, scores: Tensor) -> Edit | None:
    site = Site("decoder", method.layer - 1)
    seen = {Rows(site): observed(scores)} if method.score == "last" else {Columns(site): scores}
    return method.edit(Site("decoder", method.layer), torch.zeros(*before.shape, 1), before, seen, State())


def test_the_hand_example() -> None:
    before = layout("tt1111tt")
    change = edit(FastV(keep=0.5), before, ROW)
    assert change is not None
    after = before.after(change)

    assert after.origin.tolist() == [[0, 1, 3, 4, 6, 7]]
    assert after.positions.tolist() == [[[0, 1, 3, 4, 6, 7]]]
    assert (after.live, after.visual) == ((6,), (2,))


def test_the_score_is_the_head_mean_of_the_last_query() -> None:
    probabilities = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    attention = Attention(probabilities.log(), torch.zeros(2, 3, 4))

    assert_close(last_row_scores(attention), probabilities[:, :, -1].mean(1))


def test_the_softmax_is_over_the_whole_sequence() -> None:
    logits = torch.tensor([[[[0.0, 1.0, 2.0]]]])
    earlier = Attention(logits, logits.logsumexp(-1) + 1)  # keys of an earlier turn take their share

    assert_close(last_row_scores(earlier), (logits - logits.logsumexp(-1) - 1).exp()[:, 0, 0])


@given(prompts(), st.data())
def test_everything_but_the_worst_visual_rows_is_kept_in_order(before: Layout, data: st.DataObject) -> None:
    pinned = before.pinned or (0,) * len(before.visual)
    counts = tuple(data.draw(st.integers(least, visual)) for least, visual in zip(pinned, before.visual))
    scores = torch.rand(before.shape, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    scores = scores.masked_fill(before.predicting, 1)  # which stays, whatever it scores
    visual = before.rows(*VISUAL)
    best = top_rows(scores, visual, counts)
    after = before.after(before.keeping(best, counts))

    keep = torch.zeros_like(visual)
    for sample, origin in enumerate(after.origin):
        keep[sample, origin[origin >= 0]] = True
        assert origin[origin >= 0].diff().gt(0).all()
    assert torch.equal(keep & ~visual, before.valid & ~visual)
    assert tuple((keep & visual).sum(1).tolist()) == counts == after.visual
    for kept, candidates, score in zip(keep, visual, scores):
        dropped = candidates & ~kept
        assert not dropped.any() or not (kept & candidates).any() or score[dropped].max() <= score[kept & candidates].min()


@given(prompts(), st.floats(0, 1, exclude_min=True), st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(before: Layout, keep: float, seed: int) -> None:
    method = FastV(keep=keep)
    scores = torch.rand(before.shape, generator=torch.Generator().manual_seed(seed))
    together = edit(method, before, scores)
    after = before if together is None else before.after(together)

    for sample in range(before.shape[0]):
        alone = Layout.build(
            before.rows(*VISUAL)[sample : sample + 1],
            before.valid[sample : sample + 1],
            before.positions[:, sample : sample + 1],
            before.items[sample : sample + 1],
        )
        change = edit(method, alone, scores[sample : sample + 1])
        one = alone if change is None else alone.after(change)
        assert after.origin[sample][after.valid[sample]].tolist() == one.origin[one.valid].tolist()


def test_several_images_are_ranked_jointly() -> None:
    change = edit(FastV(keep=3), layout("1112222t"), ROW)
    assert change is not None

    # the best three of all seven: one of the first image, two of the second
    assert layout("1112222t").after(change).origin.tolist() == [[0, 3, 6, 7]]


def test_text_alone_is_left_alone() -> None:
    assert edit(FastV(keep=0.5), layout("tttttttt"), ROW) is None


def test_a_whole_budget_is_no_edit() -> None:
    assert edit(FastV(keep=1.0), layout("tt1111tt"), ROW) is None
    assert edit(FastV(keep=99), layout("tt1111tt"), ROW) is None


def test_the_paper_reading_ranks_by_columns() -> None:
    method = FastV(keep=1, score="all")
    change = edit(method, layout("tt1111tt"), ROW.flip(1))
    assert change is not None

    assert method.reads(traits()) == (Columns(Site("decoder", 1)),)
    assert layout("tt1111tt").after(change).origin.tolist() == [[0, 1, 4, 6, 7]]


def test_it_reads_the_layer_before_and_edits_the_input_of_its_own() -> None:
    assert FastV(layer=3).reads(traits()) == (Rows(Site("decoder", 2)),)
    assert FastV(layer=3).sites(traits()) == (Site("decoder", 3),)


def test_a_layer_that_does_not_exist_is_refused() -> None:
    assert FastV(layer=32).check(traits()) == "layer=32: must be in 1..31"
    assert FastV(layer=31).check(traits()) is None
