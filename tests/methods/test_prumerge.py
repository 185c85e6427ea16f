"""PruMerge: the card's examples and invariants, the adaptive count, and budgets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.signal import QueryKey, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import PruMerge
from foveate.methods.before_llm import prumerge
from foveate.methods.before_llm.prumerge import cls_attention, even_grid, merging, outliers, published_grid
from tests.methods.bodiless import traits
from tests.methods.vision import only, vision_layout
from tests.suite.bodies import BODIES

HAND = torch.tensor([[0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.65]])
KEYS = torch.tensor([[[1, 0], [0.9, 0.1], [0.8, 0.2], [0, 1], [0, 1], [0, 1], [0.7, 0.3], [1, 0]]])
OPEN = frozenset({"pre_projector", "projected"})


def clip(**changed: Any) -> Traits:
    return traits(**({"vision_sites": OPEN} | changed))


def keep_only(token: int, attention: Tensor, keys: Tensor, **options: Any) -> Reduction:
    """One token stays, all that is dropped makes another."""
    kept = torch.zeros_like(attention, dtype=torch.bool)
    kept[:, token] = True
    order = torch.arange(attention.shape[1]).expand(kept.shape)
    return merging(attention, keys, order, kept, torch.ones_like(kept), (2,) * len(kept), **options)


def signals(layout: Layout, cls: bool, seed: int = 0, peaks: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``[I, N, D]``, queries and keys ``[I, H, n, d]`` with a few tokens of each image that stand out."""
    generator = torch.Generator().manual_seed(seed)
    images, rows = layout.shape
    key = torch.randn(images, 2, rows + cls, 3, generator=generator)
    query = torch.randn(images, 2, rows + cls, 3, generator=generator)
    for image in range(images):
        for row in (
            layout.valid[image].nonzero().flatten()[torch.randperm(layout.visual[image], generator=generator)[:peaks]]
        ):
            key[image, :, row + cls] += 2 * query[image, :, 0]
    return torch.randn(images, rows, 4, generator=generator), query, key


def edit(method: PruMerge, layout: Layout, x: Tensor, query: Tensor, key: Tensor) -> Edit | None:
    return method.edit(Site("pre_projector"), x, layout, {QueryKey(Site("encoder", 23)): (query, key)}, State())


def test_the_fence_of_the_worked_example() -> None:
    everywhere = torch.ones_like(HAND).bool()

    assert outliers(HAND, everywhere).tolist() == [1]
    assert outliers(HAND, everywhere, fence=20).tolist() == [0]


def test_the_quartiles_of_an_image_leave_out_its_padding() -> None:
    padded = torch.cat([torch.zeros(1, 9), HAND], dim=1)
    valid = torch.arange(17)[None] >= 9

    assert outliers(padded, valid).tolist() == outliers(HAND, torch.ones_like(HAND).bool()).tolist()


def test_equal_attention_has_no_outliers() -> None:
    assert outliers(torch.full((1, 16), 1 / 16), torch.ones(1, 16).bool()).tolist() == [0]


def test_the_merge_of_the_worked_example() -> None:
    x = torch.arange(8.0)[None, :, None]
    merged = keep_only(7, HAND, KEYS).apply(x)

    assert_close(merged.flatten(), torch.tensor([8.33, 1.33]))


def test_two_neighbours_of_the_worked_example() -> None:
    x = torch.arange(8.0)[None, :, None]
    merged = keep_only(7, HAND, KEYS, neighbours=2).apply(x)

    assert_close(merged.flatten(), torch.tensor([7.03, 1.33]))


def test_neighbours_without_weight_change_nothing() -> None:
    attention = torch.zeros(1, 8).index_fill(1, torch.tensor([7]), 1.0)
    x = torch.arange(8.0)[None, :, None]

    assert keep_only(7, attention, KEYS).apply(x).flatten().tolist() == [7, 0]


def test_the_additional_token_takes_the_place_of_the_best_that_was_dropped() -> None:
    assert keep_only(7, HAND, KEYS).anchor.tolist() == [[7, 6]]
    assert keep_only(2, HAND, KEYS).anchor.tolist() == [[2, 7]]


def test_the_paper_averages_over_dropped_neighbours() -> None:
    x = torch.arange(8.0)[None, :, None]
    kept = torch.zeros(1, 8, dtype=torch.bool)
    kept[:, [0, 7]] = True
    order = torch.arange(8)[None]
    merged = merging(HAND, KEYS, order, kept, torch.ones_like(kept), (2,), neighbours=2, reading="paper").apply(x)

    # Nearest of token 7 are 0 and 1, but 0 stays: 1 and 2 it is, and for token 0 as well.
    assert_close(merged[0, 1, 0], torch.tensor((0.65 * 7 + 0.03 * 1 + 0.04 * 2) / 0.72))
    assert_close(merged[0, 0, 0], torch.tensor((0.02 * 0 + 0.03 * 1 + 0.04 * 2) / 0.09))


def test_the_published_grid() -> None:
    grid = published_grid(torch.ones(1, 576).bool(), torch.tensor([32]))

    assert grid.nonzero()[:, 1].tolist() == list(range(0, 576, 6))
    assert published_grid(torch.ones(1, 577).bool(), torch.tensor([32])).nonzero()[:, 1].tolist() == list(range(0, 576, 6))


@pytest.mark.parametrize("tokens", [16, 144, 256, 576])
def test_strides_are_those_that_floating_point_gave(tokens: int) -> None:
    for count in range(1, tokens // 4 + 1):
        published = list(range(0, tokens - 1, int(int(1 / (count / tokens)) / 3)))
        grid = published_grid(torch.ones(1, tokens).bool(), torch.tensor([count]))
        assert grid.nonzero()[:, 1].tolist() == published


@given(st.integers(1, 40), st.data())
def test_an_even_grid_has_exactly_so_many_cells(total: int, data: st.DataObject) -> None:
    rest = torch.tensor([data.draw(st.lists(st.booleans(), min_size=total, max_size=total))])
    count = data.draw(st.integers(0, int(rest.sum())))
    grid = even_grid(rest, torch.tensor([count]))
    places = (rest.long().cumsum(1) - 1)[grid]

    assert int(grid.sum()) == count
    assert not (grid & ~rest).any()
    if count > 1:
        assert places.diff().max() - places.diff().min() <= 1


def test_attention_is_that_of_one_head_of_the_full_width() -> None:
    query, key = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    full = (query @ key.transpose(1, 2) * 6**-0.5).softmax(-1)

    assert_close(cls_attention(query, key, 1), full[:, 0, 1:])
    assert_close(cls_attention(query, key, 0), full.mean(1))


def test_padding_gets_no_attention_and_gives_none() -> None:
    query, key = torch.randn(2, 2, 7, 6, generator=torch.Generator().manual_seed(0))
    for prefix in (0, 1):
        valid = torch.tensor([[True] * 4 + [False] * (3 - prefix), [True] * (7 - prefix)])
        seen = cls_attention(query, key, prefix, valid)

        assert_close(seen[:1, :4], cls_attention(query[:1, : 4 + prefix], key[:1, : 4 + prefix], prefix))
        assert not seen[0, 4:].any()
        assert_close(seen[1:], cls_attention(query[1:], key[1:], prefix))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=3), st.booleans(), st.booleans(), st.integers(0, 99))
def test_the_outliers_decide_how_many_stay(counts: list[int], cls: bool, plus: bool, seed: int) -> None:
    layout = vision_layout(counts, cls=False)
    x, query, key = signals(layout, cls, seed)
    change = edit(PruMerge(plus=plus), layout, x, query, key)
    assert change is not None
    after = layout.after(change)
    attention = cls_attention(query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2), int(cls), layout.valid)
    tops = outliers(attention, layout.valid).clamp(min=1)
    kept = [
        set(attention[image].masked_fill(~layout.valid[image], -1).argsort(descending=True)[:top].tolist())
        for image, top in enumerate(tops.tolist())
    ]
    if plus:
        grid = published_grid(layout.valid, tops)
        kept = [mine | set(cells.nonzero().flatten().tolist()) for mine, cells in zip(kept, grid)]

    assert after.visual == after.live == tuple(len(mine) + (len(mine) < n) for mine, n in zip(kept, counts))
    for image, mine in enumerate(kept):
        anchors = change.reduction.anchor[image].tolist()
        assert len({row for row in anchors if row >= 0}) == after.visual[image]
        assert set(anchors[: len(mine)]) == mine
        assert all(row == -1 for row in anchors[after.visual[image] :])


@pytest.mark.parametrize("plus", [False, True])
def test_outliers_come_first_by_attention_and_the_rest_last(plus: bool) -> None:
    layout = vision_layout([36], cls=False)
    x, query, key = signals(layout, True)
    change = edit(PruMerge(plus=plus), layout, x, query, key)
    assert change is not None
    attention = cls_attention(query.transpose(1, 2).flatten(2), key.transpose(1, 2).flatten(2), 1)[0]
    top = int(outliers(attention[None], layout.valid))
    anchors = change.reduction.anchor[0]
    dropped = torch.ones(36).bool().index_fill(0, anchors[:-1], False)

    assert attention[anchors[:top]].diff().lt(0).all()
    assert anchors[top:-1].diff().gt(0).all()
    assert attention[anchors[-1]] == attention[dropped].max()
    assert_close(change.reduction.apply(x)[0, -1], (attention[dropped, None] * x[0, dropped]).sum(0))


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.one_of(st.integers(1, 30), st.floats(0.02, 1)),
    st.booleans(),
    st.sampled_from(("code", "paper")),
)
def test_an_image_keeps_exactly_its_budget(counts: list[int], keep: int | float, plus: bool, reading: Any) -> None:
    layout = vision_layout(counts, cls=False)
    method = PruMerge(keep=keep, plus=plus, reading=reading)
    budget = method.budget()
    assert budget is not None
    wanted = tuple(budget.of(count) for count in counts)
    change = edit(method, layout, *signals(layout, True))
    if wanted == tuple(counts):
        assert change is None
        return
    assert change is not None
    after = layout.after(change)

    assert (after.visual, after.live) == (wanted, wanted)
    assert after.valid.sum(1).tolist() == list(wanted)
    for ordinals, alive in zip(after.ordinal.tolist(), wanted):
        assert len({cell for cell in ordinals if cell >= 0}) == alive


@given(
    st.lists(st.integers(2, 20), min_size=2, max_size=3),
    st.one_of(st.none(), st.integers(1, 20), st.floats(0.05, 1)),
    st.booleans(),
    st.booleans(),
    st.sampled_from(("code", "paper")),
)
def test_an_image_is_treated_as_if_it_were_alone(
    counts: list[int], keep: int | float | None, plus: bool, cls: bool, reading: Any
) -> None:
    layout = vision_layout(counts, cls=False, gaps=[[1, 3], [2, 5], [4, 1]])
    x, query, key = signals(layout, cls)
    method = PruMerge(keep=keep, plus=plus, reading=reading)

    def run(layout: Layout, x: Tensor, query: Tensor, key: Tensor) -> tuple[Layout, Tensor]:
        change = edit(method, layout, x, query, key)
        return (layout, x) if change is None else (layout.after(change), change.reduction.apply(x))

    after, together = run(layout, x, query, key)
    for image, count in enumerate(counts):
        rows = torch.cat([torch.ones(int(cls)).bool(), layout.valid[image]])
        mine = (part[image : image + 1, :, rows] for part in (query, key))
        one, alone = run(vision_layout([count], cls=False), only(x, layout, image), *mine)
        assert_close(only(together, after, image), alone, atol=1e-5, rtol=1e-4)
        assert torch.equal(only(after.ordinal, after, image), one.ordinal)


def test_the_order_of_the_kept_does_not_change_them() -> None:
    generator = torch.Generator().manual_seed(0)
    attention, keys = torch.rand(1, 12, generator=generator) / 12, torch.randn(1, 12, 3, generator=generator)
    x, kept = torch.randn(1, 12, 4, generator=generator), (torch.arange(12) % 3 == 0)[None]
    order, valid = torch.arange(12)[None], torch.ones(1, 12).bool()
    there, back = (merging(attention, keys, way, kept, valid, (5,)).apply(x) for way in (order, 11 - order))

    assert_close(there[:, :4], back[:, :4].flip(1))
    assert_close(there[:, 4], back[:, 4])


def test_similarities_are_held_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = vision_layout([60], cls=False)
    given = signals(layout, True)
    whole = edit(PruMerge(keep=40), layout, *given)
    monkeypatch.setattr(prumerge, "CHUNK", 7)
    chunked = edit(PruMerge(keep=40), layout, *given)
    assert whole is not None
    assert chunked is not None

    assert_close(chunked.reduction.apply(given[0]), whole.reduction.apply(given[0]))


def test_all_originals_are_accounted_for() -> None:
    layout = vision_layout([20, 30], cls=False)
    change = edit(PruMerge(), layout, *signals(layout, True))
    assert change is not None

    assert_close(layout.after(change).size.sum(1), torch.tensor([20.0, 30.0]))


def test_it_reads_the_block_that_is_fed_the_features() -> None:
    assert PruMerge().reads(clip()) == (QueryKey(Site("encoder", 23)),)
    assert PruMerge(layer=22).reads(clip()) == (QueryKey(Site("encoder", 22)),)
    assert PruMerge().sites(clip()) == (Site("pre_projector"),)
    assert PruMerge().check(clip()) is None


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (PruMerge(), clip(encoder_layers=None), "needs encoder attention"),
        (PruMerge(), clip(vision_sites=frozenset({"projected"})), "'pre_projector'"),
        (PruMerge(), clip(feature_layer=23), "read that one, layer=23"),
        (PruMerge(layer=24), clip(), "layer=24: must be in 0..23"),
    ],
)
def test_what_cannot_be_is_refused_at_attach(method: PruMerge, model: Traits, reason: str) -> None:
    assert reason in str(method.check(model))


@pytest.mark.parametrize(
    "parameters",
    [{"keep": 0}, {"plus": 1}, {"fence": -1}, {"neighbours": 1.5}, {"layer": -1}, {"reading": "both"}],
)
def test_parameters_that_mean_nothing_are_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"prumerge: {next(iter(parameters))}="):
        PruMerge(**parameters)


@pytest.mark.filterwarnings("ignore::foveate.NeedsTraining")
@pytest.mark.parametrize(
    ("family", "norm", "projection", "prefix"), [("internvl", "k_norm", "", 1), ("idefics3", "", "k_proj", 0)]
)
@torch.no_grad()
def test_a_token_of_several_cells_has_their_mean_key(
    family: str, norm: str, projection: str, prefix: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = BODIES[family]
    model = body.model()
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    plain = PruMerge.edit

    def watched(self: PruMerge, site: Site, x: Tensor, layout: Layout, given: Any, state: State) -> Edit | None:
        ((query, key),) = given.values()
        seen.append((x, query, key))
        return plain(self, site, x, layout, given, state)

    monkeypatch.setattr(PruMerge, "edit", watched)
    made: list[Tensor] = []
    with foveate.attach(model, "prumerge(layer=3, keep=6, reading='paper')") as session:
        assert session.anatomy.encoder is not None
        attention = session.anatomy.encoder.attention[3]
        hook = getattr(attention, norm or projection).register_forward_hook(lambda module, args, out: made.append(out))
        model(**body.inputs([(3, 1, 6)]))
        hook.remove()
    ((x, query, key),) = seen
    tokens = x.shape[1]
    side = int((4 * tokens) ** 0.5)
    cells = made[0][:, prefix:].unflatten(1, (side // 2, 2, side // 2, 2)).mean((2, 4)).flatten(1, 2)

    assert key.shape[2] == query.shape[2] == tokens + prefix
    assert_close(key.transpose(1, 2).flatten(2)[:, prefix:], cells)
    assert_close(key.transpose(1, 2).flatten(2)[:, :prefix], made[0][:, :prefix])
    assert session.report.visual_tokens == (6.0,) * len(session.report.visual_tokens)
