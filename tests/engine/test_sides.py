"""Products of low rank beside a linear: whose rows get which, with no count of them, on disk and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import FoveateError
from foveate.core.roles import Role
from foveate.core.weights import ForRoles, Replaced, Side
from foveate.engine.linears import dense, read_back, tensors_of, values
from foveate.engine.packed import PackedLinear
from foveate.engine.sides import TEXT, Chosen, Present, added, said, saying
from foveate.ops.grid import Grid, tokens

T, V, F, N, A, P = Role.TEXT, Role.IMAGE, Role.VIDEO, Role.NEWLINE, Role.AUDIO, Role.PAD
ROLE = torch.tensor([[P, T, V, V, N, T, A], [T, V, A, A, V, T, T]])
VISION = (int(V), int(F), int(N))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def side(experts: int = 1, rank: int = 3, inputs: int = 24, out: int = 16) -> Side:
    route = random(experts, inputs).abs() if experts > 1 else None
    return Side(random(experts, rank, inputs) / 5, random(experts, rank, out), route)


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(24, 16).requires_grad_(False)


def replaced(**more: Any) -> Replaced:
    weight = linear().weight
    grid = Grid.of(weight, 4)
    return Replaced(grid, grid.integers(weight), **more)


def by_role(activations: int = 8) -> Replaced:
    vision = ForRoles(VISION, random(24).abs() + 0.5, (side(),))
    sound = ForRoles((int(A),), random(24).abs() + 2, (side(rank=2),))
    return replaced(divide=torch.full((24,), 0.7), activations=activations, by_role=(vision, sound))


def row_by_row(there: Replaced, role: Tensor, x: Tensor) -> Tensor:
    """One after the other, as the definition has it."""
    weight, made = values(there, torch.float32), []
    for kind, row in zip(role.flatten().tolist(), x.reshape(-1, x.shape[-1]), strict=True):
        mine = next((one for one in there.by_role if kind in one.roles), None)
        divided = row / (there.divide if mine is None else mine.divide)
        out = functional.linear(tokens(divided, there.activations), weight, linear().bias)
        for each in there.sides + (() if mine is None else mine.sides):
            place = 0 if each.router is None else int((each.router @ divided.abs()).argmin())
            out = out + each.up[place].mT @ (each.down[place] @ divided)
        made.append(out)
    return torch.stack(made).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("activations", [16, 8])
@pytest.mark.parametrize("most", [None, {int(V): 4, int(N): 1, int(F): 0, int(A): 3}, {int(V): 40, int(N): 1}])
def test_each_row_gets_what_its_role_says(most: dict[int, int] | None, activations: int) -> None:
    there, x = by_role(activations), random(2, 7, 24)
    with saying(Present(ROLE, most)):
        made = PackedLinear(linear(), there)(lambda x: x, x)
        assert torch.equal(dense(there, linear())(x), made)
    torch.testing.assert_close(made, row_by_row(there, ROLE, x), rtol=1e-5, atol=1e-5)


def test_rows_of_one_kind_get_their_path_alone() -> None:
    there, x = by_role(), random(2, 7, 24)
    stand = dense(there, linear())
    with saying(Present(torch.full((2, 7), int(T)), {int(V): 0, int(F): 0, int(N): 0, int(A): 0})):
        text = stand(x)
    assert torch.equal(text, dense(Replaced(there.grid, there.integers, there.divide, 8), linear())(x))
    with saying(Present(torch.full((2, 7), int(V)))):
        seen = stand(x)
    alone = Replaced(there.grid, there.integers, there.by_role[0].divide, 8, sides=there.by_role[0].sides)
    torch.testing.assert_close(seen, dense(alone, linear())(x))
    with saying(TEXT):
        assert torch.equal(stand(x[:, :1]), text[:, :1])


def test_who_asks_for_rows_that_are_not_there_or_not_known_is_refused() -> None:
    there = by_role()
    packed, x = PackedLinear(linear(), there), random(2, 7, 24)
    for called in (packed, lambda original, x: dense(there, linear())(x)):
        with pytest.raises(FoveateError, match=r"make depends on what each row is, .* call the model or its generate"):
            called(lambda x: x, x)
        with saying(Present(ROLE)), pytest.raises(FoveateError, match="call the model or its generate"):
            called(lambda x: x, x[:, :5])
    assert said() is None
    everywhere = replaced(divide=torch.ones(24), sides=(side(), side(5)))
    torch.testing.assert_close(PackedLinear(linear(), everywhere)(lambda x: x, x), row_by_row(everywhere, ROLE, x))


@pytest.mark.parametrize("rows", [1, 2, 3, 40])
def test_a_token_gets_the_product_that_its_router_chooses_however_many_rows_there_are(rows: int) -> None:
    of, x = side(experts=6), random(rows, 24)
    assert of.router is not None
    choice = (x.abs() @ of.router.mT).argmin(-1)
    assert rows < 40 or len(choice.unique()) > 2
    torch.testing.assert_close(
        added(of, x), torch.stack([(of.up[e].mT @ (of.down[e] @ row)) for e, row in zip(choice, x, strict=True)])
    )
    torch.testing.assert_close(added(of, x[torch.arange(rows - 1, -1, -1)]), added(of, x).flip(0))
    alike = Side(of.down, of.up, torch.zeros(6, 24))
    torch.testing.assert_close(added(alike, x), x @ of.down[0].mT @ of.up[0])  # the first of equals


def test_places_are_found_without_counting() -> None:
    found = Present(ROLE, {int(V): 5, int(N): 1, int(F): 0, int(A): 3}).rows(VISION)
    assert isinstance(found, Chosen)
    assert found.index is not None
    assert found.index.tolist() == [2, 3, 4, 8, 11, 0]
    assert found.inside[:, 0].tolist() == [True] * 5 + [False]
    assert Present(ROLE, {int(A): 0}).rows((int(A),)) is None
    whole = Present(ROLE).rows(VISION)
    assert whole is not None
    assert whole.index is None
    assert torch.equal(whole.mask, found.mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_written_comes_back(dtype: torch.dtype) -> None:
    there = by_role()
    there = Replaced(there.grid, there.integers, there.divide, 8, sides=(side(), side(4)), by_role=there.by_role)
    written = tensors_of(there, dtype)
    back = read_back(written)
    assert all("." not in name for name in written)
    for mine, theirs in zip(
        (*there.sides, *(s for one in there.by_role for s in one.sides)),
        (*back.sides, *(s for one in back.by_role for s in one.sides)),
        strict=True,
    ):
        assert torch.equal(mine.down, theirs.down)
        assert torch.equal(mine.up, theirs.up)
        assert (mine.router is None) == (theirs.router is None)
    assert [one.roles for one in back.by_role] == [one.roles for one in there.by_role]
    assert all(torch.equal(a.divide, b.divide) for a, b in zip(there.by_role, back.by_role, strict=True))
    x = random(2, 7, 24)
    with saying(Present(ROLE)):
        assert torch.equal(dense(back, linear())(x), dense(there, linear())(x))


def test_bytes_of_sides_count() -> None:
    plain, more = PackedLinear(linear(), replaced()), PackedLinear(linear(), replaced(sides=(side(),)))
    assert more.nbytes - plain.nbytes == 4 * 3 * (24 + 16)
