"""SparseVLM: the card's worked examples, its tables, and what is recycled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.signal import Attention, Rows, Site
from foveate.core.state import State
from foveate.methods import SparseVLM
from foveate.methods.in_llm.sparsevlm import KEPT, KEPT_PLUS, TOKENS, ranks, rating, recycled
from foveate.ops.cluster import density_peaks
from tests.methods.bodiless import LLAVA_13B, layout, traits

LAYER = Site("decoder", 2)
EVERY = torch.ones(1, 3, dtype=torch.bool)


def run(method: SparseVLM, rows: Layout, x: Tensor, attention: Tensor) -> Layout:
    """What is left when all question rows rate by ``attention`` ``[B, N]``."""
    method, state = method.fitted(traits()), State()
    asking = (rows.question_rows >= 0).sum(1).max()
    logits = attention.log()[:, None, None].expand(-1, 2, int(asking), -1)
    seen: dict[Any, Any] = {Rows(Site("decoder", 1), "question"): Attention(logits, torch.zeros(logits.shape[:3]))}
    assert method.edit(Site("sequence"), torch.zeros_like(x), rows, {}, state) is None
    edit = method.edit(LAYER, x, rows, seen, state)
    assert edit is not None
    return rows.after(edit)


def test_raters_of_the_worked_example() -> None:
    visual, text = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 0.0], [0.0, 0.0], [0.0, 1.0]]])
    relevance, raters = rating(visual, EVERY[:, :2], text, EVERY)

    assert_close(relevance, torch.tensor([[0.4995, 0.1592, 0.3413]]), atol=1e-4, rtol=0)
    assert raters.tolist() == [[True, False, True]]


def test_where_none_is_above_the_mean_all_rate() -> None:
    visual, text = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0)), torch.ones(1, 3, 4)

    assert rating(visual, EVERY, text[:, :1], EVERY[:, :1])[1].tolist() == [[True]]
    assert rating(visual, EVERY, text, torch.tensor([[False, True, True]]))[1].tolist() == [[False, True, True]]


def test_rank_of_the_worked_example() -> None:
    rows = torch.tensor([[0.4, 0.1, 0.3, 0.1, 0.1], [0.2, 0.1, 0.5, 0.1, 0.1]])
    three = torch.cat([rows, rows.sum(0, keepdim=True)])

    assert ranks(three[None], EVERY, (5,)) == [2]
    assert_close(rows.mean(0), torch.tensor([0.3, 0.1, 0.4, 0.1, 0.1]))


def test_padding_changes_no_rank() -> None:
    rows = torch.rand(1, 3, 5, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(rows, (4, 90, 2, 40))
    raters = torch.nn.functional.pad(EVERY, (2, 40))

    assert ranks(padded, raters, (5,)) == ranks(rows, EVERY, (5,)) == [3]


def test_clusters_of_the_worked_example() -> None:
    x = torch.tensor([[[0.0, 0.0], [0.1, 0.0], [5.0, 5.0], [5.1, 5.0], [0.0, 0.1], [9.0, 0.0]]])
    _, cluster = density_peaks(x, 2, 2)
    means = sorted(x[0, cluster[0] == number].mean(0).tolist() for number in (0, 1))

    assert_close(torch.tensor(means), torch.tensor([[0.0333, 0.0333], [6.3667, 3.3333]]), atol=1e-4, rtol=0)


def test_the_first_stage_of_192() -> None:
    assert SparseVLM()._recycled(276) == (83, 9)
    assert SparseVLM()._recycled(0) == (0, 0)
    assert SparseVLM(recycle=1.0, clusters=1.0)._recycled(4) == (4, 4)


@pytest.mark.parametrize(
    ("plus", "means", "last"),
    [(False, (192.03, 128.63, 96.94, 64.81), (113, 39, 27, 18)), (True, (192.44, 128.0, 96.81, 64.44), (118, 60, 28, 20))],
)
def test_the_presets_average_what_they_are_called(plus: bool, means: tuple[float, ...], last: tuple[int, ...]) -> None:
    for preset, mean, final in zip((192, 128, 96, 64), means, last):
        method = SparseVLM(preset=preset, plus=plus).fitted(traits())  # type: ignore[arg-type]
        assert method.layers == (3, 7, 16)
        alive = TOKENS
        by_layer = [TOKENS] * 2  # the tables count a layer that ranks as if it had dropped already
        for budget, until in zip(method.counts or (), (6, 15, 32)):
            kept = round(budget * TOKENS)
            alive = kept if plus else kept + method._recycled(alive - kept)[1]
            by_layer += [alive] * (until - len(by_layer))
        assert sum(by_layer) / 32 == pytest.approx(mean, abs=0.006)
        assert alive == final


def test_budgets_of_other_grids_and_depths() -> None:
    method = SparseVLM(preset=64).fitted(traits(LLAVA_13B, decoder_layers=40))

    assert method.layers == (4, 9, 20)
    assert method.counts == tuple(kept / TOKENS for kept in KEPT[64])
    assert SparseVLM(preset=64, plus=True).fitted(traits()).counts == tuple(kept / TOKENS for kept in KEPT_PLUS[64])
    assert SparseVLM(rank=(13.5, 0.0)).fitted(traits()).layers == (3, 7, 16, 20)


def test_clusters_stand_behind_the_last_picture_and_later_text_follows() -> None:
    rows = layout("t1111111111t11t2222tt", "......t11111111111ttt")
    generator = torch.Generator().manual_seed(0)
    x, attention = torch.randn(*rows.shape, 8, generator=generator), torch.rand(rows.shape, generator=generator)
    after = run(SparseVLM(layers=(2,), counts=(4,)), rows, x, attention)

    assert after.visual == (4 + 1, 4 + 1)
    roles = ["".join("v" if role == 2 else "t" for role in sample if role) for sample in after.role.tolist()]
    assert [text.rstrip("t")[-1] for text in roles] == ["v", "v"]
    assert [len(text) - len(text.rstrip("t")) for text in roles] == [2, 3]
    assert after.positions[0, 1, -9:].tolist() == list(range(9))


def test_a_prompt_gets_in_a_batch_what_it_gets_alone() -> None:
    prompts = "t11111111111111ttttt", ".....tt111111111111t"
    rows = layout(*prompts)
    generator = torch.Generator().manual_seed(1)
    x, attention = torch.randn(*rows.shape, 8, generator=generator), torch.rand(rows.shape, generator=generator)
    method = SparseVLM(layers=(2,), counts=(0.4,), recycle=0.9, clusters=0.4)
    both = run(method, rows, x, attention)
    for b, prompt in enumerate(prompts):
        alone = run(method, layout(prompt), x[b : b + 1], attention[b : b + 1])
        assert both.ordinal[b][both.valid[b]].tolist() == alone.ordinal[0].tolist()


def test_a_row_that_predicts_is_kept_and_stays_the_last() -> None:
    rows = layout("tt11111111")
    x = torch.randn(1, 10, 4, generator=torch.Generator().manual_seed(0))
    attention = torch.linspace(1, 0.1, 10)[None]
    after = run(SparseVLM(layers=(2,), counts=(0,)), rows, x, attention)

    assert after.ordinal[0, -1] == 7
    assert after.visual == (2,)


def test_members_are_averaged() -> None:
    x = torch.tensor([[[1.0], [2.0], [4.0], [8.0], [9.0]]])
    rows, order = torch.tensor([[0, 1, 2, 3]]), torch.tensor([[3, 0, 1, 2]])
    text = torch.tensor([[False, False, False, False, True]])
    merged = recycled(x, rows, order, text, torch.tensor([[3]]), [(1, 3, 1)], (3,))

    assert_close(merged.apply(x)[0, :, 0], torch.tensor([8.0, 7 / 3, 9.0]), atol=1e-5, rtol=0)


def test_a_budget_of_all_changes_nothing_and_what_does_not_fit_is_refused() -> None:
    rows = layout("t1111t")
    method = SparseVLM(layers=(2,), counts=(4,)).fitted(traits())

    assert method.edit(LAYER, torch.randn(1, 6, 4), rows, {}, State()) is None
    with pytest.raises(FoveateError, match="counts=\\(5,\\): must be None with rank"):
        SparseVLM(layers=(2,), counts=(5,), rank=(9.0, 6.0))
    assert "must be one for each of layers=(3, 7, 16)" in str(SparseVLM(counts=(5,)).check(traits()))
