"""FOLDER: the card's examples and invariants, and its two forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.roles import Role
from foveate.core.signal import Attention, QueryKey, Rows, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import Folder
from foveate.methods.in_encoder.folder import MergeAttention, fold_plan, folded
from tests.methods.bodiless import traits
from tests.methods.vision import only, vision_layout

EVERYWHERE = frozenset({"middle", "projected"})
FOUR = torch.tensor([[[1.0, 0], [0.9, 0.1], [0, 1], [0.1, 2]]])
SIX = torch.cat([FOUR, torch.tensor([[[1.0, 1], [-1, 1]]])], dim=1)


def clip(**changed: Any) -> Traits:
    return traits(**({"vision_sites": EVERYWHERE} | changed))


def features(method: Folder, x: Tensor, layout: Layout | None = None) -> Edit | None:
    layout = layout or vision_layout([x.shape[1]] * len(x), cls=False)
    return method.edit(Site("projected"), x, layout, {}, State())


def encoded(method: Folder, x: Tensor, layout: Layout, attention: Tensor) -> Edit | None:
    """The encoder form: keys are the rows, in two heads; ``attention`` ``[I, n]`` is that of CLS."""
    site = Site("encoder", 22)
    keys = torch.stack([x, 2 * x], dim=1)
    rows = Attention(attention[:, None, None].log(), torch.zeros(len(x), 1, 1))
    seen = {QueryKey(site): (keys, keys), Rows(site, "cls"): rows}
    return method.edit(Site("encoder", 22, "middle"), x, layout, seen, State())


def merged(edit: Edit | None, x: Tensor) -> Tensor:
    assert edit is not None
    return edit.reduction.apply(x)


def size(edit: Edit | None, layout: Layout) -> Tensor:
    assert edit is not None
    return layout.after(edit).size


def random(layout: Layout, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(*layout.shape, width, generator=torch.Generator().manual_seed(seed)) * layout.valid[..., None]


@pytest.mark.parametrize(
    ("rows", "remove", "folds"),
    [
        (577, 288, [288]),
        (577, 384, [288, 96]),
        (577, 432, [288, 144]),
        (4, 2, [1, 1]),
        (49, 47, [24, 12, 6, 3, 1, 1]),
        (2, 1, [1]),
        (9, 0, []),
    ],
)
def test_the_plan_of_the_folds(rows: int, remove: int, folds: list[int]) -> None:
    assert fold_plan(rows, remove) == folds


def test_one_token_of_four_joins_another() -> None:
    layout = vision_layout([4], cls=False)
    for scale in (False, True):  # 1 < 1 is false: a single fold that leaves too few is not scaled
        edit = features(Folder(keep=3, form="features", scale=scale), FOUR)

        assert_close(merged(edit, FOUR), torch.tensor([[[1, 0], [0.9, 0.1], [0.05, 1.5]]]))
        assert size(edit, layout).tolist() == [[1, 1, 2]]


def test_two_tokens_of_four_join_in_two_folds() -> None:
    edit = features(Folder(keep=2), FOUR)

    assert_close(merged(edit, FOUR), torch.tensor([[[0.95, 0.05], [0.05, 1.5]]]))
    assert size(edit, vision_layout([4], cls=False)).tolist() == [[2, 2]]


def test_the_released_code_scales_by_size_after_several_folds() -> None:
    scaled = merged(features(Folder(keep=2, form="features", scale=True), FOUR), FOUR)

    assert_close(scaled, torch.tensor([[[1.608490, 0.084657], [0.084657, 2.539721]]]), atol=1e-6, rtol=0)


def test_the_released_code_scales_after_one_fold_that_leaves_many() -> None:
    scaled = merged(features(Folder(keep=5, form="features", scale=True), SIX), SIX)

    assert_close(scaled[0, 2], torch.tensor([0.084657, 2.539721]), atol=1e-6, rtol=0)
    assert_close(scaled[0, [0, 1, 3, 4]], SIX[0, [0, 1, 4, 5]])


@given(st.lists(st.integers(2, 20), min_size=1, max_size=3), st.floats(0.05, 1), st.booleans())
def test_every_image_keeps_its_budget_and_no_token_is_lost(counts: list[int], keep: float, in_encoder: bool) -> None:
    layout = vision_layout(counts, cls=in_encoder)
    x = random(layout)
    method = Folder(keep=keep)
    edit = encoded(method, x, layout, torch.full(layout.shape, 1e-3)) if in_encoder else features(method, x, layout)
    kept = tuple(method.budget().of(count) for count in counts)
    if kept == tuple(counts):
        assert edit is None
        return
    assert edit is not None
    after = layout.after(edit)

    assert (after.visual, after.live) == (kept, tuple(count + in_encoder for count in kept))
    assert after.valid.sum(1).tolist() == list(after.live)
    assert_close(after.size.sum(1), layout.size.sum(1))
    total = (merged(edit, x) * after.size[..., None]).sum(1)
    assert_close(total, x.sum(1), atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(3, 14), min_size=2, max_size=3), st.floats(0.05, 1), st.booleans(), st.booleans())
def test_an_image_is_folded_as_if_it_were_alone(counts: list[int], keep: float, in_encoder: bool, scale: bool) -> None:
    layout = vision_layout(counts, in_encoder, gaps=[[1, 3], [2, 5], [4, 1]])
    x = random(layout)
    attention = torch.rand(layout.shape, generator=torch.Generator().manual_seed(1)) * 1e-3
    method = Folder(keep=keep, form="features", scale=scale) if not in_encoder else Folder(keep=keep)

    def run(x: Tensor, layout: Layout, attention: Tensor) -> tuple[Tensor, Layout]:
        edit = encoded(method, x, layout, attention) if in_encoder else features(method, x, layout)
        return (x, layout) if edit is None else (merged(edit, x), layout.after(edit))

    together, after = run(x, layout, attention)
    for image, count in enumerate(counts):
        mine = only(x, layout, image), vision_layout([count], in_encoder), only(attention, layout, image)
        alone, one = run(*mine)
        assert_close(only(together, after, image), alone)
        assert torch.equal(only(after.ordinal, after, image), one.ordinal)


def test_equal_tokens_stay_equal() -> None:
    layout = vision_layout([16])
    x = torch.ones(1, 17, 3)

    assert_close(merged(encoded(Folder(keep=3), x, layout, torch.ones(1, 17) / 17), x), torch.ones(1, 4, 3))


def test_cls_stays_what_and_where_it_is() -> None:
    layout = vision_layout([9, 9])
    x = random(layout)
    edit = encoded(Folder(keep=2), x, layout, torch.full((2, 10), 0.1))
    assert edit is not None

    assert torch.equal(merged(edit, x)[:, 0], x[:, 0])
    assert layout.after(edit).role[:, 0].tolist() == [Role.CLS, Role.CLS]


def test_what_cls_attends_to_does_not_move() -> None:
    layout = vision_layout([8])
    x = random(layout)
    attention = torch.full((1, 9), 1e-4)
    for token in (2, 4, 6, 8):  # the rows that might move
        spared = encoded(Folder(keep=5), x, layout, attention.index_fill(1, torch.tensor([token]), 0.5))
        assert spared is not None
        assert token in spared.reduction.anchor[0].tolist()
    ignored = encoded(Folder(keep=5, alpha=0), x, layout, torch.rand(1, 9))

    assert ignored is not None
    assert torch.equal(ignored.reduction.anchor, folded(x, torch.ones(1, 9), (3,), (9,), protected=1, order="grouped")[1])


def test_the_attention_of_cls_to_itself_is_not_needed() -> None:
    layout = vision_layout([12])
    x = random(layout)
    attention = torch.rand(1, 13, generator=torch.Generator().manual_seed(3)) / 13
    whole = encoded(Folder(keep=4), x, layout, attention)
    without = encoded(Folder(keep=4), x, layout, attention[:, 1:])

    assert_close(merged(whole, x), merged(without, x))


def test_how_attention_is_merged_matters_from_the_second_fold_on() -> None:
    generator = torch.Generator().manual_seed(0)
    x, ones = torch.randn(1, 32, 4, generator=generator), torch.ones(1, 32)
    attention = torch.rand(1, 32, generator=generator) / 500

    def anchors(remove: int, how: MergeAttention) -> list[int]:
        _, anchor = folded(x, ones, (remove,), (32,), attention=attention, merge_attention=how)
        return anchor[0].tolist()

    assert anchors(15, "mean") == anchors(15, "sum")
    assert anchors(26, "mean") != anchors(26, "sum")


def test_orders_as_published() -> None:
    layout = vision_layout([8])
    x = random(layout)
    inside = encoded(Folder(keep=5), x, layout, torch.full((1, 9), 0.1))
    behind = features(Folder(keep=5), x[:, 1:])
    assert inside is not None
    assert behind is not None
    raster = behind.reduction.anchor[0]
    grouped = inside.reduction.anchor[0]

    assert raster.tolist() == sorted(raster.tolist())
    assert grouped.tolist() == sorted(grouped.tolist(), key=lambda row: (row % 2, row))
    turned = features(Folder(keep=5, order="grouped"), x[:, 1:])
    assert turned is not None
    assert turned.reduction.anchor[0].tolist() == sorted(raster.tolist(), key=lambda row: (row % 2, row))


@pytest.mark.parametrize("keep", [1.0, 16, 999])
def test_a_whole_budget_is_no_edit(keep: int | float) -> None:
    layout = vision_layout([16])

    assert encoded(Folder(keep=keep), random(layout), layout, torch.ones(1, 17)) is None
    assert features(Folder(keep=keep), random(layout)[:, 1:]) is None


@pytest.mark.parametrize(
    "changed", [{"has_cls": False}, {"encoder_layers": None}, {"vision_sites": frozenset({"projected"})}]
)
def test_it_folds_features_where_the_encoder_does_not_allow_it(changed: dict[str, Any]) -> None:
    model = clip(**changed)

    assert Folder().sites(model) == (Site("projected"),)
    assert Folder().reads(model) == ()
    assert Folder().check(model) is None
    assert "use form='features'" in str(Folder(form="encoder").check(model))


def test_it_folds_in_the_encoder_where_it_can() -> None:
    site = Site("encoder", 22)

    assert Folder().sites(clip()) == (Site("encoder", 22, "middle"),)
    assert Folder().reads(clip()) == (QueryKey(site), Rows(site, "cls"))
    assert Folder(form="encoder").check(clip()) is None
    assert Folder(form="features").sites(clip()) == (Site("projected"),)


def test_a_model_with_no_place_for_it_is_refused() -> None:
    assert "'projected'" in str(Folder().check(clip(vision_sites=frozenset())))


@pytest.mark.parametrize(
    "parameters",
    [
        {"keep": 0},
        {"form": "both"},
        {"alpha": -1},
        {"constant": "c"},
        {"merge_attention": "max"},
        {"order": "random"},
        {"scale": True},
    ],
)
def test_parameters_that_mean_nothing_are_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"folder: {next(iter(parameters))}="):
        Folder(**parameters)
