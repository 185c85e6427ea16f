"""ToMe: the card's schedules and invariants, and the budget over the blocks of an encoder."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.roles import Role
from foveate.core.signal import QueryKey, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import ToMe
from foveate.methods.in_encoder.tome import equal_steps, parse_r
from tests.methods.bodiless import traits
from tests.methods.vision import only, vision_layout

OPEN = frozenset({"middle"})


def clip(**changed: Any) -> Traits:
    return traits(**({"encoder_layers": 4, "feature_layer": 2, "vision_sites": OPEN} | changed))


def merge(method: ToMe, model: Traits, layout: Layout, x: Tensor) -> tuple[Layout, Tensor, Tensor | None]:
    """All blocks of an encoder that does nothing else; the keys of each block are its rows, in two heads."""
    state, bias = State(), None
    state.put("session", "traits", model)
    for site in method.sites(model):
        keys = torch.stack([x, 2 * x], dim=1)
        edit = method.edit(site, x, layout, {QueryKey(Site("encoder", site.layer)): (keys, keys)}, state)
        if edit is not None:
            layout, x, bias = layout.after(edit), edit.reduction.apply(x), edit.key_bias
    return layout, x, bias


def tokens(layout: Layout, seed: int = 0) -> Tensor:
    x = torch.randn(*layout.shape, 4, generator=torch.Generator().manual_seed(seed))
    return x * layout.valid[..., None]


@pytest.mark.parametrize(
    ("r", "schedule"),
    [(8, [8, 8, 8, 8]), ((8, -1), [16, 10, 5, 0]), ((8, 1), [0, 5, 10, 16]), ([3, 2], [3, 2, 0, 0]), ([1] * 6, [1] * 4)],
)
def test_the_published_schedules(r: Any, schedule: list[int]) -> None:
    assert parse_r(4, r) == schedule


def test_a_schedule_of_one_block() -> None:
    assert parse_r(1, (8, 0)) == [8]


@given(st.integers(1, 700), st.integers(1, 700), st.integers(1, 24))
def test_equal_steps_reach_the_budget_wherever_halving_can(count: int, keep: int, blocks: int) -> None:
    keep = min(keep, count)
    steps = equal_steps(count, keep, blocks)

    assert (steps is None) == (count > keep * 2**blocks)
    if steps is not None:
        assert count - sum(steps) == keep
        left = count
        for step in steps:
            assert 0 <= step <= left // 2
            left -= step
        if (count - keep) // blocks + 1 <= keep:
            assert max(steps) - min(steps) <= 1


def test_clip_in_llava_goes_down_to_the_budgets_of_the_literature() -> None:
    for keep in (192, 128, 64):
        assert equal_steps(576, keep, 23) is not None
    assert equal_steps(576, 192, 23) == [17] * 16 + [16] * 7


@given(st.lists(st.integers(9, 20), min_size=1, max_size=3), st.integers(3, 20), st.booleans())
def test_every_image_keeps_its_budget_and_no_token_is_lost(counts: list[int], keep: int, cls: bool) -> None:
    layout = vision_layout(counts, cls)
    x = tokens(layout)
    after, merged, _ = merge(ToMe(keep=keep), clip(has_cls=cls), layout, x)

    assert after.visual == tuple(min(keep, count) for count in counts)
    assert after.live == tuple(count + cls for count in after.visual)
    assert torch.equal(after.valid.sum(1), torch.tensor(after.live))
    assert_close(after.size.sum(1), layout.size.sum(1))
    # Each original counts once: the sum over all of them is what it was.
    assert_close((merged * after.size[..., None]).sum(1), x.sum(1), atol=1e-4, rtol=1e-4)


@given(st.lists(st.integers(4, 12), min_size=2, max_size=3), st.booleans(), st.floats(0.2, 1))
def test_an_image_is_merged_as_if_it_were_alone(counts: list[int], cls: bool, keep: float) -> None:
    layout = vision_layout(counts, cls, gaps=[[1, 3], [2, 5], [4, 1]])
    x = tokens(layout)
    after, merged, _ = merge(ToMe(keep=keep), clip(has_cls=cls), layout, x)

    for image, count in enumerate(counts):
        one, alone, _ = merge(ToMe(keep=keep), clip(has_cls=cls), vision_layout([count], cls), only(x, layout, image))
        assert_close(only(merged, after, image), alone)
        assert torch.equal(only(after.ordinal, after, image), one.ordinal)


def test_cls_stays_what_and_where_it_is() -> None:
    layout = vision_layout([16, 16])
    x = tokens(layout)
    after, merged, _ = merge(ToMe(keep=3), clip(), layout, x)

    assert after.role[:, 0].tolist() == [Role.CLS, Role.CLS]
    assert torch.equal(merged[:, 0], x[:, 0])
    assert torch.equal(after.size[:, 0], torch.ones(2))


def test_a_merged_token_counts_as_often_as_it_has_originals() -> None:
    layout = vision_layout([9])
    x = tokens(layout)
    after, merged, bias = merge(ToMe(keep=4), clip(), layout, x)
    assert bias is not None
    repeated = merged[0].repeat_interleave(after.size[0].long(), dim=0)[None]

    assert_close(
        scaled_dot_product_attention(merged, merged, merged, attn_mask=bias[:, None]),
        scaled_dot_product_attention(merged, repeated, repeated),
    )


def test_padding_has_no_bias() -> None:
    _, _, bias = merge(ToMe(keep=0.5), clip(), vision_layout([16, 9]), tokens(vision_layout([16, 9])))

    assert bias is not None
    assert torch.isfinite(bias).all()


def test_without_proportional_attention_there_is_no_bias() -> None:
    layout = vision_layout([9])

    assert merge(ToMe(keep=4, proportional=False), clip(), layout, tokens(layout))[2] is None


def test_plain_means_forget_earlier_merges() -> None:
    layout = vision_layout([3], cls=False)
    x = torch.tensor([[[1.0, 0], [1, 0.1], [0, 6]]])  # the first two merge, then the third joins them
    model = clip(has_cls=False)
    _, weighted, _ = merge(ToMe(r=(1, 1)), model, layout, x)
    _, plain, _ = merge(ToMe(r=(1, 1), weighted=False), model, layout, x)

    assert_close(weighted[0, 0], torch.tensor([2 / 3, 6.1 / 3]))
    assert_close(plain[0, 0], torch.tensor([0.5, 3.025]))


def test_equal_tokens_stay_equal() -> None:
    layout = vision_layout([16])
    _, merged, _ = merge(ToMe(keep=5), clip(), layout, torch.ones(1, 17, 3))

    assert_close(merged, torch.ones(1, 6, 3))


@pytest.mark.parametrize("method", [ToMe(keep=1.0), ToMe(keep=16), ToMe(keep=999), ToMe(r=0), ToMe(r=())])
def test_a_whole_budget_is_no_edit(method: ToMe) -> None:
    layout = vision_layout([16])
    after, merged, _ = merge(method, clip(), layout, tokens(layout))

    assert after is layout
    assert torch.equal(merged, tokens(layout))


@pytest.mark.parametrize(
    ("method", "left"),
    [
        (ToMe(r=2), 16 - 6),
        (ToMe(r=99), 2),  # 8, 4 and 2 at most
        (ToMe(r=(5, 0, 1)), 10),
        (ToMe(r=(3,)), 13),
        (ToMe(r=2, inflect=-1), 16 - 4 - 2 - 1),
        (ToMe(r=2, inflect=1), 16 - 0 - 1 - 2),
    ],
)
def test_r_overrides_the_budget(method: ToMe, left: int) -> None:
    layout = vision_layout([16])

    assert merge(method, clip(), layout, tokens(layout))[0].visual == (left,)


def test_it_acts_in_every_block_up_to_the_one_that_feeds_the_projector() -> None:
    assert ToMe().sites(clip()) == tuple(Site("encoder", block, "middle") for block in range(3))
    assert ToMe().reads(clip()) == tuple(QueryKey(Site("encoder", block)) for block in range(3))


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (ToMe(), clip(encoder_layers=None), "use folder(form='features')"),
        (ToMe(), clip(vision_sites=frozenset({"projected"})), "'middle'"),
        (ToMe(keep=0.1), clip(), "keep=0.1: 3 blocks, each of which at most halves, cannot go below 0.125; raise keep"),
        (ToMe(keep=1), clip(patches=16), "leave 2 or more of an image's 16 tokens; use keep=2"),
    ],
)
def test_what_cannot_be_is_refused_at_attach(method: ToMe, model: Traits, reason: str) -> None:
    assert reason in str(method.check(model))


def test_what_can_be_is_not_refused() -> None:
    for method in (ToMe(), ToMe(keep=2), ToMe(keep=0.125), ToMe(keep=1, r=3)):
        assert method.check(clip()) is None
        assert method.check(clip(patches=16)) is None


def test_a_budget_out_of_reach_is_refused_when_images_are_seen_only_then() -> None:
    layout = vision_layout([17])

    with pytest.raises(FoveateError, match=r"tome: keep=2: 3 blocks.*leave 3 or more of an image's 17 tokens; use keep=3"):
        merge(ToMe(keep=2), clip(), layout, tokens(layout))


@pytest.mark.parametrize(
    "parameters",
    [{"keep": 0}, {"r": -1}, {"r": (1, -2)}, {"r": 2.5}, {"r": True}, {"inflect": 2, "r": 1}, {"inflect": 0.5}],
)
def test_parameters_that_mean_nothing_are_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"tome: {next(iter(parameters))}="):
        ToMe(**parameters)
