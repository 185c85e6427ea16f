"""Index-preserving pruning: the card's worked example, dilation within image and frame, and a classifier that learns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Numbers, Site
from foveate.core.state import State
from foveate.methods import IndexPreserving
from foveate.methods.before_encoder.index_preserving import cell_logits, dilated, train
from tests.methods.bodiless import LLAVA_7B, traits

CELL = (1, 2, 2)


def grids(*sizes: tuple[int, int] | tuple[int, int, int]) -> Layout:
    """One image a sample: rows, columns, and frames; padded on the left."""
    items = [Item(size[0], size[1], number, *size[2:]) for number, size in enumerate(sizes)]
    widest = max(item.count for item in items)
    there = torch.stack([torch.arange(widest) >= widest - item.count for item in items])
    return Layout.build(there, there, torch.zeros(1, *there.shape, dtype=torch.long), [[item] for item in items])


def classifier() -> dict[str, Tensor]:
    """Weights by which a cell whose first pixel is the largest is foreground: the logit is about that pixel, normed."""
    pixels = 4
    return {
        "norm_weight": torch.ones(pixels),
        "norm_bias": torch.zeros(pixels),
        "hidden_weight": torch.eye(pixels)[:1],
        "hidden_bias": torch.zeros(1),
        "head_weight": torch.ones(1, 1),
        "head_bias": torch.full((1,), -0.5),
    }


def pictures(layout: Layout, *foreground: list[int]) -> Tensor:
    """Cells ``[I, N, 4]``, those with the given raster numbers foreground."""
    cells = torch.zeros(*layout.shape, 4)
    cells[..., 1] = 1.0
    for sample, numbers in enumerate(foreground):
        for number in numbers:
            cells[sample, layout.ordinal[sample] == number] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    return cells


def edit(layout: Layout, cells: Tensor, **settings: Any) -> Edit | None:
    seen = {Numbers("index_preserving"): classifier()}
    return IndexPreserving(**settings).edit(Site("patches"), cells, layout, seen, State())


def kept(layout: Layout, *foreground: list[int], **settings: Any) -> list[list[int]]:
    """Raster numbers that stay of each image."""
    change = edit(layout, pictures(layout, *foreground), **settings)
    after = layout if change is None else layout.after(change)
    return [row[row >= 0].tolist() for row in after.ordinal]


def test_the_worked_example() -> None:
    assert kept(grids((4, 4)), [5]) == [[0, 1, 2, 4, 5, 6, 8, 9, 10]]


def test_positions_of_the_worked_example() -> None:
    row = torch.arange(4)
    cells = torch.stack([torch.full((16,), 5), 5 + row.repeat_interleave(4), 5 + row.repeat(4)])
    text = torch.arange(5).expand(3, -1)
    positions = torch.cat([text, cells, torch.arange(9, 12).expand(3, -1)], dim=1)[:, None]
    visual = ((torch.arange(24) >= 5) & (torch.arange(24) < 21))[None]
    prompt = Layout.build(visual, torch.ones_like(visual), positions, [[Item(4, 4, 0)]])
    keep = ~visual
    keep[0, torch.tensor([0, 1, 2, 4, 5, 6, 8, 9, 10]) + 5] = True

    def after(text_after: Any) -> Tensor:
        change = Edit(Reduction.keeping(keep), positions="anchor", text_after=text_after)
        return prompt.after(change).positions[:, 0]

    followed, left = after("follow"), after("keep")
    assert followed[1, 5:14].tolist() == [5, 5, 5, 6, 6, 6, 7, 7, 7]
    assert followed[2, 5:14].tolist() == [5, 6, 7] * 3
    assert followed[:, 14:].tolist() == [[8, 9, 10]] * 3
    assert left[:, 14:].tolist() == [[9, 10, 11]] * 3


def test_images_of_different_grids_keep_their_own_cells() -> None:
    assert kept(grids((2, 3), (4, 4)), [0], [15]) == [[0, 1, 3, 4], [10, 11, 14, 15]]


def test_the_order_of_images_changes_nothing() -> None:
    one, other = kept(grids((2, 3), (4, 4)), [0], [15]), kept(grids((4, 4), (2, 3)), [15], [0])

    assert one == other[::-1]


def test_frames_do_not_reach_into_each_other() -> None:
    # two frames of 2 x 3 cells: the last row of the first frame touches nothing of the second
    assert kept(grids((4, 3, 2)), [4]) == [[0, 1, 2, 3, 4, 5]]


def test_a_page_of_background_keeps_its_likeliest_cell() -> None:
    layout = grids((4, 4))
    cells = pictures(layout, [])
    cells[0, 6, 0] = 0.2
    change = edit(layout, cells)
    assert change is not None

    assert layout.after(change).ordinal.tolist() == [[6]]
    assert (change.live, change.visual) == ((1,), (1,))


def test_a_full_page_is_left_alone() -> None:
    assert edit(grids((2, 2)), pictures(grids((2, 2)), [0])) is None
    assert edit(grids((4, 4)), pictures(grids((4, 4)), []), threshold=-1e9) is None


def test_without_dilation_only_the_foreground_stays() -> None:
    assert kept(grids((4, 4)), [5, 10], kernel=1) == [[5, 10]]


def test_text_follows_or_stays() -> None:
    layout = grids((4, 4))
    follow, keep = (edit(layout, pictures(layout, [5]), text_after=after) for after in ("follow", "keep"))
    assert follow is not None
    assert keep is not None

    assert (follow.positions, follow.text_after) == ("anchor", "follow")
    assert keep.text_after == "keep"


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=3), st.integers(0, 99))
def test_dilation_reaches_the_eight_neighbours(sizes: list[tuple[int, int]], seed: int) -> None:
    layout = grids(*sizes)
    foreground = (torch.rand(layout.shape, generator=torch.Generator().manual_seed(seed)) > 0.7) & layout.valid
    mask = dilated(foreground, layout)

    for sample, cells in enumerate(layout.yx):
        marked = cells[foreground[sample]]
        near = (cells[:, None] - marked[None]).abs().amax(-1) <= 1
        assert mask[sample].tolist() == (near.any(1) & layout.valid[sample]).tolist()


def test_the_classifier_is_a_norm_a_layer_and_a_head() -> None:
    generator = torch.Generator().manual_seed(0)
    convolution, norm, head = torch.nn.Conv2d(3, 5, 4, 4), torch.nn.LayerNorm([3, 4, 4]), torch.nn.Linear(5, 1)
    torch.nn.init.normal_(norm.weight, generator=generator)
    cells = torch.rand(7, 3, 4, 4, generator=generator)
    expected = head(torch.nn.functional.gelu(convolution(norm(cells)).flatten(1)))[:, 0]
    weights = {
        "norm_weight": norm.weight.flatten(),
        "norm_bias": norm.bias.flatten(),
        "hidden_weight": convolution.weight.flatten(1),
        "hidden_bias": convolution.bias,
        "head_weight": head.weight,
        "head_bias": head.bias,
    }

    assert_close(cell_logits(cells.flatten(1), weights), expected)


@pytest.fixture(scope="module")
def labelled() -> tuple[Tensor, Tensor]:
    """Plain cells, one in five with a bright stroke."""
    generator = torch.Generator().manual_seed(0)
    cells = torch.randn(1000, 3, 4, 4, generator=generator) * 0.3
    labels = torch.rand(1000, generator=generator) < 0.2
    cells[labels, :, 1] += 2.0
    return cells, labels


def test_training_finds_the_strokes(labelled: tuple[Tensor, Tensor]) -> None:
    cells, labels = labelled
    weights = train(cells, labels, hidden=16, steps=200, rate=3e-3)
    found = cell_logits(cells.flatten(1), weights) > 0

    assert (found == labels).float().mean() > 0.97
    assert not any(weight.requires_grad for weight in weights.values())


def test_training_is_a_function_of_its_seed(labelled: tuple[Tensor, Tensor]) -> None:
    first, again, other = (train(*labelled, hidden=4, steps=3, seed=seed) for seed in (0, 0, 1))

    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["hidden_weight"], other["hidden_weight"])


OPEN = dict(vision_sites=frozenset({"patches"}), cell=CELL)
TRAINED = Artifact("index_preserving", LLAVA_7B, {"cell": list(CELL)})


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        (dict(artifacts={"index_preserving": TRAINED}, **OPEN), None),
        (dict(OPEN), "run `foveate calibrate index_preserving` on this model"),
        (dict(artifacts={"index_preserving": TRAINED}, **(OPEN | {"cell": None})), "this model has None"),
        (dict(artifacts={"index_preserving": TRAINED}, **(OPEN | {"cell": (3, 14, 14)})), "calibrate it again"),
        (dict(artifacts={"index_preserving": TRAINED}, cell=CELL), "needs the site 'patches'"),
    ],
    ids=["hosted", "no classifier", "no cells", "other cells", "site closed"],
)
def test_what_cannot_host_it_is_refused_with_the_remedy(settings: dict[str, Any], remedy: str | None) -> None:
    reason = IndexPreserving().check(traits(**settings))

    assert reason is None if remedy is None else remedy in str(reason)


def test_a_classifier_of_another_model_is_refused() -> None:
    with pytest.raises(FoveateError, match="made on"):
        IndexPreserving().check(traits(Fingerprint("llava", 4, 8, 64), artifacts={"index_preserving": TRAINED}, **OPEN))


def test_it_acts_before_the_encoder() -> None:
    assert IndexPreserving().sites(traits()) == (Site("patches"),)
    assert IndexPreserving().reads(traits()) == (Numbers("index_preserving"),)


@pytest.mark.parametrize(
    ("parameter", "value"), [("threshold", float("nan")), ("kernel", 2), ("kernel", 0), ("text_after", "shift")]
)
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"index_preserving: {parameter}="):
        IndexPreserving(**{parameter: value})
