"""VisionZip: the card's worked example and limiting cases, CLS among the tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.signal import Attention, Columns, Keys, Rows, Seen, Site, Summary
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import VisionZip
from foveate.methods.before_llm.visionzip import edit_of, zipped
from tests.methods.bodiless import traits
from tests.methods.vision import only, vision_layout

OPEN = frozenset({"patches", "encoder", "middle", "pre_projector", "projected"})
CLOSED = frozenset({"projected"})
SITE = Site("encoder", 22)
HAND = torch.tensor([[0.1, 0.3, 0.05, 0.05, 0.2, 0.28]])
HAND_KEYS = torch.tensor([[[1, 0], [1, 0], [1, 0], [0, 1], [1, 0], [0.6, 0.8]]])


def seen(score: Tensor, keys: Tensor, summary: Tensor | None = None) -> Seen:
    """What the encoder shows: attention of CLS if there is one, else attention received."""
    if summary is None:
        return {Columns(SITE): score, Keys(SITE): keys}
    logits = score.log()[:, None, None]
    return {Rows(SITE, "cls"): Attention(logits, logits.new_zeros(logits.shape[:3])), Keys(SITE): keys, Summary(): summary}


def signals(layout: Layout, cls: bool, seed: int = 0) -> tuple[Tensor, Seen]:
    generator = torch.Generator().manual_seed(seed)
    images, rows = layout.shape
    score = torch.rand(images, rows, generator=generator) + 0.01
    keys = torch.randn(images, rows, 3, generator=generator)
    x, summary = (torch.randn(images, n, 4, generator=generator) for n in (rows, 1))
    return x, seen(score, keys, summary if cls else None)


def edit(method: VisionZip, layout: Layout, x: Tensor, shown: Seen) -> Edit | None:
    return method.edit(Site("pre_projector"), x, layout, shown, State())


def values(change: Edit, x: Tensor) -> Tensor:
    return change.reduction.apply(x) if change.values is None else change.values


def test_the_worked_example() -> None:
    x = torch.arange(1.0, 7)[None, :, None]
    change = edit_of([(2, 2)], x, vision_layout([6], cls=False), seen(HAND, HAND_KEYS, torch.full((1, 1, 1), 100.0)))

    assert values(change, x)[0, :, 0].tolist() == [100, 2, 5, 10]


def test_without_cls_targets_stay_in_their_places() -> None:
    x = torch.arange(1.0, 7)[None, :, None]
    change = edit_of([(1, 2)], x, vision_layout([6], cls=False), seen(HAND, HAND_KEYS))

    assert change.reduction.anchor.tolist() == [[0, 1, 3]]
    assert values(change, x)[0, :, 0].tolist() == [5, 2, 10]


def test_equal_keys_all_join_the_first_target() -> None:
    x, score = torch.rand(1, 9, 2), torch.arange(9.0, 0, -1)[None]
    made = zipped(score, torch.ones(1, 9, 3), torch.ones(1, 9).bool(), [9], [2], [3])
    tokens = made.reduction([5]).apply(x)[0]

    assert_close(tokens[2], x[0, 2] + x[0, [3, 5, 7, 8]].mean(0))  # of seven, every second is a target: 2, 4 and 6
    assert torch.equal(tokens[3:], x[0, [4, 6]])


def test_where_nothing_is_left_to_merge_targets_are_as_they_were() -> None:
    x, score = torch.rand(1, 8, 2), torch.rand(1, 8)
    made = zipped(score, torch.randn(1, 8, 3), torch.ones(1, 8).bool(), [8], [3], [5])

    assert torch.equal(made.reduction([8], raster=True).apply(x), x)


@given(
    st.lists(st.integers(1, 20), min_size=1, max_size=3),
    st.one_of(st.integers(1, 20), st.floats(0.05, 1)),
    st.one_of(st.integers(0, 5), st.floats(0, 1)),
    st.booleans(),
)
def test_an_image_keeps_exactly_its_budget(counts: list[int], keep: int | float, contextual: int | float, cls: bool) -> None:
    layout = vision_layout(counts, cls=False)
    method = VisionZip(keep=keep, contextual=contextual)
    wanted = tuple(min(keep, n) if isinstance(keep, int) else min(max(round(n * keep), 1), n) for n in counts)
    x, shown = signals(layout, cls)
    change = edit(method, layout, x, shown)
    if wanted == tuple(counts):
        assert change is None
        return
    assert change is not None
    after = layout.after(change)

    assert (after.visual, after.live) == (wanted, wanted)
    assert after.valid.sum(1).tolist() == list(wanted)
    for image, alive in enumerate(wanted):
        assert len({cell for cell in after.ordinal[image].tolist() if cell >= 0}) == alive
        if cls and alive < counts[image]:
            assert torch.equal(values(change, x)[image, 0], shown[Summary()][image, 0])


@given(st.lists(st.integers(2, 20), min_size=2, max_size=3), st.integers(1, 20), st.booleans())
def test_an_image_is_treated_as_if_it_were_alone(counts: list[int], keep: int, cls: bool) -> None:
    layout = vision_layout(counts, cls=False, gaps=[[1, 3], [2, 5], [4, 1]])
    x, shown = signals(layout, cls)
    method = VisionZip(keep=keep, contextual=0.4)

    def run(layout: Layout, x: Tensor, shown: Seen) -> tuple[Layout, Tensor]:
        change = edit(method, layout, x, shown)
        return (layout, x) if change is None else (layout.after(change), values(change, x))

    after, together = run(layout, x, shown)
    for image, count in enumerate(counts):
        score, keys, *summary = _own(shown, layout, image)
        one, alone = run(vision_layout([count], cls=False), only(x, layout, image), seen(score, keys, *summary))
        assert_close(only(together, after, image), alone)
        assert torch.equal(only(after.ordinal, after, image), one.ordinal)


def _own(shown: Seen, layout: Layout, image: int) -> Sequence[Tensor]:
    attention, keys, *summary = shown.values()
    score = attention.probabilities()[:, 0, 0] if isinstance(attention, Attention) else attention
    return only(score, layout, image), only(keys, layout, image), *(of[image : image + 1] for of in summary)


@pytest.mark.parametrize(
    ("keep", "split"), [(192, (162, 30)), (128, (108, 20)), (64, (54, 10)), (32, (27, 5)), (2, (1, 1)), (1, (1, 0))]
)
def test_budgets_are_split_as_published(keep: int, split: tuple[int, int]) -> None:
    assert VisionZip().split(keep) == split


def test_where_it_acts_and_what_it_reads() -> None:
    clip, siglip = traits(vision_sites=OPEN), traits(vision_sites=OPEN, has_cls=False)
    tiles = traits(vision_sites=CLOSED)

    assert VisionZip().sites(clip) == (Site("pre_projector"),)
    assert VisionZip().reads(clip) == (Rows(SITE, "cls"), Keys(SITE), Summary())
    assert VisionZip(place="embeddings").sites(clip) == VisionZip().sites(siglip) == (Site("projected"),)
    assert VisionZip().reads(siglip) == (Columns(SITE), Keys(SITE))
    assert VisionZip().reads(tiles) == (Rows(SITE, "cls"), Keys(SITE))


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (VisionZip(), traits(encoder_layers=None), "needs encoder attention"),
        (VisionZip(place="features"), traits(vision_sites=CLOSED), "place='features'"),
        (VisionZip(place="features"), traits(vision_sites=OPEN, has_cls=False), "use 'embeddings'"),
    ],
)
def test_what_cannot_be_is_refused_at_attach(method: VisionZip, model: Traits, reason: str) -> None:
    assert reason in str(method.check(model))


@pytest.mark.parametrize("parameters", [{"keep": 0}, {"contextual": -1}, {"contextual": 1.5}, {"place": "encoder"}])
def test_parameters_that_mean_nothing_are_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"visionzip: {next(iter(parameters))}="):
        VisionZip(**parameters)
