"""MeToM: the card's worked examples and limiting cases of its three stages."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.roles import Item
from foveate.core.signal import Attention, Rows, Site
from foveate.core.state import State
from foveate.methods import MeToM
from foveate.methods.before_llm.metom import ENTRY, PACKETS, RESIDUAL, components, density, frame_budgets
from foveate.ops.matching import greedy_pairs
from tests.methods.bodiless import layout, traits
from tests.methods.vision import vision_layout
from tests.suite.bodies import BODIES, RAGGED
from tests.videos import prompt


class Handed:
    """Side data of items, one value for each."""

    def __init__(self, *values: Any) -> None:
        self.values = values

    def of(self, items: list[tuple[int, int]]) -> list[Any]:
        return [self.values[place % len(self.values)] for place, _ in enumerate(items)]


def given_side(residual: Any = None, packets: Any = None) -> Mapping[Any, Any]:
    return {RESIDUAL: Handed(residual), PACKETS: Handed(packets)}


# RPM.


@pytest.mark.parametrize(
    ("low", "first"),
    [
        ([[0, 1], [1, 1]], [0, 1, 1, 1]),
        ([[1, 0], [0, 1]], [0, 1, 2, 3]),  # corners do not touch
        ([[1, 1], [1, 1]], [0, 0, 0, 0]),
        ([[0, 0], [0, 0]], [0, 1, 2, 3]),
    ],
)
def test_components_have_four_neighbours(low: list[list[int]], first: list[int]) -> None:
    assert components(torch.tensor(low).bool()[None]).flatten().tolist() == first


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.randoms(use_true_random=False))
def test_components_are_those_of_a_walk(height: int, width: int, random: Any) -> None:
    low = torch.tensor([[random.random() < 0.6 for _ in range(width)] for _ in range(height)])
    expected = torch.arange(height * width).reshape(height, width)
    for y in range(height):
        for x in range(width):
            todo, seen = [(y, x)] if low[y, x] else [], set()
            while todo:
                cell = todo.pop()
                if cell in seen or not (0 <= cell[0] < height and 0 <= cell[1] < width) or not low[cell]:
                    continue
                seen.add(cell)
                todo += [(cell[0] + 1, cell[1]), (cell[0] - 1, cell[1]), (cell[0], cell[1] + 1), (cell[0], cell[1] - 1)]
            if seen:
                expected[y, x] = min(r * width + c for r, c in seen)
    assert torch.equal(components(low[None])[0], expected)


def test_a_constant_residual_has_no_density() -> None:
    assert torch.equal(density(torch.full((1, 3, 4, 4), 7.0), 2, 2), torch.zeros(1, 2, 2))


def quadrants(*values: float) -> Tensor:
    """A residual ``[3, 4, 4]`` of which the density is largest where the value differs most from the mean."""
    return torch.tensor(values).reshape(2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1).expand(3, 4, 4)


def square(rows: int = 2) -> Layout:
    """A tile of 2 x 2 patches behind a CLS row."""
    built = vision_layout([rows * rows])
    object.__setattr__(built, "items", ((Item(rows, rows, 0),),))
    return built


def test_the_worked_example_of_patches() -> None:
    edit = MeToM(tau=0.2).edit(ENTRY, torch.zeros(1, 5, 4), square(), given_side(quadrants(9, 0, 0, 0)), State())
    assert edit is not None
    x = torch.cat([torch.full((1, 4), 5.0), torch.eye(4)])[None]
    assert_close(edit.reduction.apply(x)[0], torch.stack([x[0, 0], x[0, 1], x[0, 2:].mean(0)]))


def test_tau_from_none_to_all() -> None:
    seen = given_side(quadrants(9, 0, 0, 0))
    assert MeToM(tau=0.0).edit(ENTRY, torch.zeros(1, 5, 4), square(), seen, State()) is None
    edit = MeToM(tau=1.5).edit(ENTRY, torch.zeros(1, 5, 4), square(), seen, State())
    assert edit is not None
    assert edit.visual == (1,)


def test_pictures_without_a_residual_are_left_alone() -> None:
    assert MeToM().edit(ENTRY, torch.zeros(1, 5, 4), square(), given_side(), State()) is None


# BTM.


def test_the_worked_example_of_budgets() -> None:
    assert frame_budgets([1, 4, 9, 16], 20, 2, [99] * 4) == [3, 4, 6, 7]
    assert frame_budgets([7, 7, 7], 12, 1, [99] * 3) == [4, 4, 4]
    assert frame_budgets([1, 4, 9, 16], 20, 5, [99] * 4) == [5] * 4


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 30)), min_size=1, max_size=8),
    st.integers(0, 200),
    st.integers(1, 9),
)
def test_budgets_add_up_and_fit(frames: list[tuple[float, int]], total: int, least: int) -> None:
    sizes, most = zip(*frames)
    budgets = frame_budgets(sizes, total, least, most)
    assert sum(budgets) == min(total, sum(most))
    assert all(0 <= budget <= there for budget, there in zip(budgets, most))


def video(frames: int, tokens: int) -> Layout:
    """A video of frames of ``tokens`` in a line, and a text row behind it."""
    visual = torch.tensor([[True] * (frames * tokens) + [False]])
    positions = torch.arange(visual.shape[1])[None, None]
    return Layout.build(visual, torch.ones_like(visual), positions, [[Item(frames, tokens, 0, frames)]])


def across(x: Tensor, before: Layout, **how: Any) -> tuple[Edit | None, list[list[int]]]:
    """The edit before the language model, and which rows each row that goes on is made of."""
    settings = dict(tau=0.0, budget=1.0, tau_tem=0.9) | how
    edit = MeToM(**settings).edit(Site("sequence"), x, before, given_side(), State())
    return edit, [] if edit is None else [row.nonzero()[:, 0].tolist() for row in edit.reduction.members()[0]]


def test_alike_tokens_of_adjacent_frames_are_merged_best_first_at_the_earlier_place() -> None:
    angles = torch.tensor([0.0, 90, 12, 200, 2, 300, 0]).deg2rad()  # frames (0, 90), (12, 200), (2, 300), and text
    x = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    edit, members = across(x, video(3, 2))
    # 12 degrees lie closer to 2 degrees (behind it) than to 0 (before it).
    assert members == [[0], [1], [2, 4], [3], [5], [6]]
    assert edit is not None
    assert_close(edit.reduction.apply(x)[0, 2], (x[0, 2] + x[0, 4]) / 2)


def test_all_pairs_of_frames_may_be_compared() -> None:
    angles = torch.tensor([0.0, 90, 150, 200, 2, 300, 0]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], dim=1)[None]
    assert across(x, video(3, 2))[0] is None
    assert across(x, video(3, 2), frames="all")[1] == [[0, 4], [1], [2], [3], [5], [6]]


def test_no_cosine_is_above_one() -> None:
    assert across(torch.ones(1, 7, 2), video(3, 2), tau_tem=1.0)[0] is None


def test_the_rest_is_folded_into_the_core_of_its_frame() -> None:
    # Two frames of three; the most remote of each is core, so each frame becomes one token.
    x = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(0))
    edit, members = across(x, video(2, 3), budget=1 / 3, tau_tem=1.0)
    assert members == [[0, 1, 2], [3, 4, 5], [6]]
    assert edit is not None
    assert_close(edit.reduction.apply(x)[0, :2], torch.stack([x[0, :3].mean(0), x[0, 3:6].mean(0)]))


def test_a_pair_serves_both_frames() -> None:
    one, other = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    x = torch.stack([one, one, other, other, other, other])[None]  # all of a frame alike: its first token is core
    edit, members = across(x[:, [0, 0, 0, 0, 2]], video(2, 2), budget=0.5)
    assert members == [[0, 1, 2, 3], [4]]
    assert edit is not None
    assert_close(edit.reduction.apply(x[:, [0, 0, 0, 0, 2]])[0], torch.stack([one, other]))


def test_tokens_that_are_equal_stay_what_they_are() -> None:
    edit, _ = across(torch.full((1, 9, 3), 2.0), video(2, 4), budget=0.4)
    assert edit is not None
    assert_close(edit.reduction.apply(torch.full((1, 9, 3), 2.0))[0], torch.full((edit.reduction.shape[1], 3), 2.0))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(6, 11), st.integers(0, 4)), max_size=20))
def test_pairs_are_those_of_the_loop(edges: list[tuple[int, int, int]]) -> None:
    used, expected = set[int](), set[int]()
    for number in sorted(range(len(edges)), key=lambda e: (-edges[e][2], e)):
        a, b, _ = edges[number]
        if a not in used and b not in used:
            used |= {a, b}
            expected.add(number)
    a, b, score = torch.tensor(edges, dtype=torch.long).reshape(-1, 3).unbind(1)
    assert set(greedy_pairs(a, b, score.float(), 12).nonzero()[:, 0].tolist()) == expected


# MATM.


def looked_at(*shares: list[float]) -> dict[Any, Any]:
    """Attention of the last row, layer by layer, over four tokens and itself."""
    found = {}
    for layer, of in enumerate(shares):
        logits = torch.tensor([*of, 1 - sum(of) + 1e-9]).log()[None, None, None]
        found[Rows(Site("decoder", layer))] = Attention(logits, logits.logsumexp(-1))
    return found


def test_the_worked_example_of_late_merging() -> None:
    x = torch.tensor([[[1.0, 0], [1, 0.1], [0, 1], [0.1, 1], [3, 3]]])
    for shares in ([[0.4, 0.1, 0.3, 0.2], [0.2, 0.29, 0.3, 0.2]], [[0.3, 0.2, 0.3, 0.2]] * 2):  # the second is a tie
        method = MeToM(tau=0.0, layers=(0, 1), rate=0.25)
        edit = method.edit(Site("decoder", 2), x, layout("1111t"), looked_at(*shares), State())
        assert edit is not None
        assert edit.visual == (3,)
        assert [row.nonzero()[:, 0].tolist() for row in edit.reduction.members()[0]] == [[0, 1], [2], [3], [4]]
        assert_close(edit.reduction.apply(x)[0, 0], torch.tensor([1.0, 0.05]))


def test_no_rate_merges_nothing() -> None:
    seen = looked_at([0.25] * 4)
    assert MeToM(layers=(0,), rate=0.0).edit(Site("decoder", 1), torch.ones(1, 5, 2), layout("1111t"), seen, State()) is None


# Where it runs.


def test_layers_end_at_a_third_of_the_depth() -> None:
    assert MeToM().fitted(traits()).layers == (8, 9, 10)


def test_models_whose_patches_cannot_be_merged_are_refused_by_name() -> None:
    reason = str(MeToM().check(traits(family="qwen2_vl", vision_sites=frozenset({"patches"}))))
    assert "tau=None" in reason
    assert "use tau=0.0" in reason
    assert MeToM(tau=0.0).check(traits(family="qwen2_vl", vision_sites=frozenset({"patches"}))) is None


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"residual": torch.zeros(4)}, r"side data 'residual': must be \[3, H, W\]"),
        ({"packet_size": -1.0}, "'packet_size': .* 0 or more"),
    ],
)
def test_side_data_of_the_wrong_shape_is_refused(side: dict[str, Any], words: str) -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with foveate.attach(model, "metom") as session, session.side(images=side), pytest.raises(FoveateError, match=words):
        model(**body.inputs(RAGGED))


@pytest.mark.parametrize(
    ("side", "words"),
    [
        ({"residual": torch.zeros(4, 3, 8, 8)}, "'residual': has 4 frames for 3 of the model"),
        ({"packet_size": torch.ones(4)}, "'packet_size': has 4 sizes for 3 frames of the model"),
    ],
)
def test_side_data_of_other_frames_is_refused(side: dict[str, Any], words: str) -> None:
    model, inputs = BODIES["qwen2_vl"].model(), prompt("qwen2_vl", torch.zeros(1, 3, 3, 16, 16))
    with (
        foveate.attach(model, "metom(tau=0.0)") as session,
        session.side(videos=side),
        pytest.raises(FoveateError, match=words),
    ):
        model(**inputs)


def test_a_batch_with_residuals_gets_what_each_sample_gets_alone() -> None:
    body = BODIES["llava-clip"]
    model = body.model().double()
    residuals = list(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    sizes = [1.0, 5.0, 2.0, 3.0]

    def run(only: int | None, start: int, count: int) -> tuple[Tensor, list[list[int]]]:
        inputs = {k: v.double() if v.is_floating_point() else v for k, v in body.inputs(RAGGED, only=only).items()}
        mine = slice(start, start + count)
        with session.side(images={"residual": residuals[mine], "packet_size": sizes[mine]}), torch.no_grad():
            logits = model(**inputs).logits[:, -1]
        return logits, [[len(item) for item in sample] for sample in session.trace.alive(4)]

    with foveate.attach(model, "metom(tau_tem=0.1)") as session:
        together, alive = run(None, 0, 4)
        for place, (start, count) in enumerate([(0, 1), (1, 2), (3, 1)]):
            alone, mine = run(place, start, count)
            assert_close(alone[0], together[place], rtol=1e-6, atol=1e-6)
            assert mine[0] == alive[place]
