"""AWQ, SmoothQuant and MBQ: what rows weigh, who is given a scale, and what is placed."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from foveate.core.roles import Role
from foveate.core.weights import Rows
from foveate.engine.trial import Trial
from foveate.methods import AWQ, MBQ, QIG, SmoothQuant
from foveate.methods.weights.mbq import gradient_ratio, parted, row_weights
from foveate.ops.scaling import RATIOS
from tests.blocks import GROUPS, NAMES, drawn, trial

T, V, A, P = Role.TEXT, Role.IMAGE, Role.ANSWER, Role.PAD


class Steep:
    """Gradients of two blocks: at visual rows half and twice those of answers."""

    def of(self, name: str) -> list[list[Rows]]:
        role = torch.tensor([V, A])
        return [[Rows(torch.tensor([[size], [1.0]]), role, torch.zeros(2, dtype=torch.long))] for size in (0.5, 2.0)]


def block(seed: int = 0, **shape: int) -> Trial:
    found = trial(drawn(seed, **shape))
    found._slopes = cast(Any, Steep())
    return found


def test_rows_of_answers_or_all_words_where_there_is_none() -> None:
    role = torch.tensor([[T, V, V, T, A, P], [P, T, V, T, T, T]])
    sample = torch.arange(2)[:, None].expand_as(role)
    visual, answer = parted(role, sample)

    assert visual.int().tolist() == [[0, 1, 1, 0, 0, 0], [0, 0, 1, 0, 0, 0]]
    assert answer.int().tolist() == [[0, 0, 0, 0, 1, 0], [0, 1, 0, 1, 1, 1]]


def test_the_ratio_is_of_means_over_rows_then_samples() -> None:
    role, sample = torch.tensor([V, V, A, V, A, A]), torch.tensor([0, 0, 0, 1, 1, 1])
    size = torch.tensor([1.0, 3.0, 4.0, 6.0, 2.0, 6.0])

    assert gradient_ratio([Rows(size[:, None], role, sample)]) == (2 + 6) / (4 + 4)
    first, second = sample == 0, sample == 1
    apart = [Rows(size[:, None][rows], role[rows], torch.zeros(3, dtype=torch.long)) for rows in (first, second)]
    assert gradient_ratio(apart) == 1.0
    assert gradient_ratio([Rows(size[:1, None], role[:1], sample[:1])]) == 1.0  # no answer, no words


def test_row_weights_of_either_loss() -> None:
    visual, answer = torch.tensor([True, True, False, False]), torch.tensor([False, False, True, False])

    assert_close(row_weights(visual, answer, 0.3, (2, 1), squared=False), torch.tensor([0.1, 0.1, 1 / 3, 0.0]))
    assert_close(row_weights(visual, answer, 0.3, (2, 1), squared=True), torch.tensor([0.15, 0.15, 1.0, 0.0]))


def test_a_block_takes_the_larger_of_its_own_ratio_and_the_median() -> None:
    found = block()
    (part,) = found.inspect(GROUPS["attn"])
    weights = MBQ().heed(found, GROUPS["attn"])(part)

    # Of blocks with 0.5 and 2 the median is 1.25, and this one is the first.
    assert_close(weights[0, 1] / weights[0, 8], torch.tensor(1.25))
    assert not weights[:, 0].any()
    assert_close(weights.sum(), torch.tensor((8 * 1.25 + 4) / 12))


@pytest.mark.parametrize("kind", [AWQ, MBQ, QIG, SmoothQuant])
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_who_has_a_scale(kind: Any, kv_heads: int) -> None:
    """Linears behind a norm share one; one with an input of its own only if an earlier linear can take it over."""
    found = block(kv_heads=kv_heads)
    kind(bits=4, group_size=-1).quantize(found)
    scaled = {name for name, module in NAMES.items() if found.placed[module].divide is not None}

    expected = set("qkv") | {"gate", "up"}
    if kind is not SmoothQuant:
        expected |= {"down"} | ({"o"} if kv_heads == 4 else set())
    assert scaled == expected
    for names in GROUPS.values():
        first = found.placed[names[0]].divide
        assert all(found.placed[name].divide is first for name in names)


@pytest.mark.parametrize(("kind", "clip"), product([AWQ, MBQ, QIG], [True, False]))
def test_what_is_placed_stands_for_the_linear(kind: Any, clip: bool) -> None:
    found = block()
    kind(bits=8, group_size=16, clip=clip).quantize(found)
    for names in GROUPS.values():
        (rows,) = found.exact(names[0])
        for name in names:
            placed, weight = found.placed[name], found.weight(name)
            assert placed.divide is not None
            got = functional.linear(rows.x / placed.divide, placed.grid.values(placed.integers))
            wanted = functional.linear(rows.x, weight)
            assert (got - wanted).abs().max() < 0.02 * wanted.abs().max()
            if clip:
                assert placed.grid.scale.shape[1] == weight.shape[1] // 16


def test_smoothing_evens_out_activations() -> None:
    found = block()
    SmoothQuant().quantize(found)
    (rows,) = found.exact(NAMES["q"])
    divide = found.placed[NAMES["q"]].divide
    assert divide is not None
    before, after = rows.x.abs().amax(0), (rows.x / divide).abs().amax(0)

    assert after.amax() / after.median() < 0.5 * before.amax() / before.median()
    assert found.placed[NAMES["q"]].activations == 8


@pytest.mark.parametrize("kind", [AWQ, MBQ, QIG])
def test_a_scale_is_never_worse_than_none_by_the_methods_own_loss(kind: Any) -> None:
    for seed, bits in product(range(2), (2, 3)):
        found = block(seed)
        method = kind(bits=bits, group_size=16)
        for names in GROUPS.values():
            got = method.found(found, names, {name: found.weight(name) for name in names})
            assert got.losses[RATIOS.index(got.ratio)] <= got.losses[0]


def test_equal_weights_make_qig_and_mbq_awq() -> None:
    found = block()
    names = GROUPS["mlp"]
    weights = {name: found.weight(name) for name in names}
    plain = AWQ(bits=3, group_size=16, loss="mae").found(found, names, weights)

    class Even(QIG):
        def weigh(self, block: Any, exact: Any, part: Any) -> Tensor:
            return torch.ones(part.role.shape)

    even = Even(bits=3, group_size=16).found(found, names, weights)
    assert even.ratio == plain.ratio
    assert_close(even.losses, plain.losses)


def test_padding_and_a_batch_of_two_change_no_scale() -> None:
    case = drawn()
    whole = trial(case)
    scale = AWQ(bits=3, group_size=16).found(whole, GROUPS["down"], {NAMES["down"]: whole.weight(NAMES["down"])}).scale
    padded = {**case, "x": functional.pad(case["x"], (0, 0, 0, 2)), "x_q": functional.pad(case["x_q"], (0, 0, 0, 2))}
    padded |= {mask: functional.pad(case[mask], (0, 2)) for mask in ("vis_mask", "ans_mask")}
    behind = trial(padded)
    behind._replay.batches[0].role[:, 9:] = int(Role.PAD)
    again = AWQ(bits=3, group_size=16).found(behind, GROUPS["down"], {NAMES["down"]: behind.weight(NAMES["down"])}).scale

    assert_close(scale, again)


def test_sixteen_bits_leave_the_model_alone() -> None:
    for method in (AWQ(), MBQ(), QIG(), SmoothQuant(activations=16)):
        assert replace(method, bits=16).plain
