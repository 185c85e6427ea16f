"""What a linear makes beside the product with its weight: products of low rank, for all rows, for some, or each its own.

Some of it depends on what a row is: a picture's, a word's, of sound. Whoever runs the rows of a prompt, or some of them,
says so meanwhile (`saying`); a linear that nobody has told refuses to guess.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.weights import ForRoles, Replaced, Side
from foveate.ops.grid import tokens

FEW = 3
"""Each expert's product is made of all rows, unless there are so many times fewer of them than experts: then each row takes
its expert's factors along."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """Some of the rows of a forward.

    Attributes:
        mask: ``[R, 1]`` bool: which they are.
        index: ``[m]`` rows with all of them in front, in order; None = all rows.
        inside: ``[m, 1]`` bool: which of ``index`` they are.
    """

    mask: Tensor
    index: Tensor | None
    inside: Tensor


class Present:
    """What the rows are that run at present.

    Args:
        role: ``[B, n]`` of each row; None = all are text.
        most: how many rows of a role there are at most, of all samples, so that nobody has to wait for the device; all may
            be of one that is not named.
    """

    def __init__(self, role: Tensor | None, most: Mapping[int, int] | None = None) -> None:
        self._role, self._most = role, most or {}
        self._chosen: dict[tuple[int, ...], Chosen | None] = {}

    def fits(self, x: Tensor) -> bool:
        """Whether ``x`` ``[..., in]`` has as many rows."""
        return self._role is None or x.numel() == self._role.numel() * x.shape[-1]

    def rows(self, roles: tuple[int, ...]) -> Chosen | None:
        """Those of some roles; None = there are none."""
        if roles not in self._chosen:
            self._chosen[roles] = self._find(roles)
        return self._chosen[roles]

    def _find(self, roles: tuple[int, ...]) -> Chosen | None:
        if self._role is None:
            return None
        count = self._role.numel()
        most = min(sum(self._most.get(role, count) for role in roles), count)
        if most == 0:
            return None
        mask = torch.isin(self._role.flatten(), self._role.new_tensor(roles))
        if most == count:
            return Chosen(mask[:, None], None, mask[:, None])
        # A stable sort puts them in front, and none of them behind what is cut off.
        index = mask.to(torch.uint8).argsort(descending=True, stable=True)[:most]
        return Chosen(mask[:, None], index, mask[index][:, None])


TEXT = Present(None)
"""Rows of text alone, such as a step of decoding."""

_SAID: ContextVar[Present | None] = ContextVar("foveate_rows", default=None)


def said() -> Present | None:
    """What the rows are that run in this thread; None = nobody has said."""
    return _SAID.get()


@contextmanager
def saying(present: Present) -> Iterator[None]:
    """The rows that run meanwhile, in this thread, are these."""
    token = _SAID.set(present)
    try:
        yield
    finally:
        _SAID.reset(token)


def refusal(name: str) -> FoveateError:
    """That linears which depend on roles were called by somebody who knows none."""
    return FoveateError(
        f"{name}: what its linears make depends on what each row is, which a part of the model called by itself cannot say; "
        "call the model or its generate"
    )


def product(
    replaced: Replaced, x: Tensor, base: Callable[[Tensor], Tensor], present: Callable[[], Present | None] = said
) -> Tensor:
    """What stands for a linear makes of ``x`` ``[..., in]``.

    Args:
        replaced: what it is.
        base: the product with its weight (and the bias), of the divided and rounded input.
        present: asked what the rows are, where anything depends on it.
    """
    of = replaced.by_role
    chosen = _chosen(of, x, present()) if of else ()
    divided = _divided(replaced, x, chosen)
    made = base(_rounded(replaced, divided).to(x.dtype))
    if not replaced.sides and not chosen:
        return made
    rows, shape = divided.reshape(-1, x.shape[-1]), made.shape
    made = made.reshape(-1, shape[-1])
    for side in replaced.sides:
        made = made + added(side, rows)
    for one, some in chosen:
        mine = rows if some.index is None else rows[some.index]
        for side in one.sides:
            more = added(side, mine) * some.inside
            made = made + more if some.index is None else made.index_add(0, some.index, more)
    return made.reshape(shape)


def added(side: Side, x: Tensor) -> Tensor:
    """What a side makes of the rows ``x`` ``[R, in]``: ``[R, out]``."""
    count, rank, _ = side.down.shape
    if side.router is None:
        return x @ side.down[0].mT @ side.up[0]
    choice = (x.abs() @ side.router.mT).argmin(-1)
    if FEW * len(x) <= count:
        inner = (side.down[choice] @ x[..., None])[..., 0]
        return (inner[:, None] @ side.up[choice])[:, 0]
    # One product for all experts, and no count of each one's rows, for which the host would have to wait.
    inner = (x @ side.down.flatten(0, 1).mT).unflatten(-1, (count, rank))
    mine = torch.arange(count, device=x.device) == choice[:, None]
    return (inner * mine[..., None]).flatten(-2) @ side.up.flatten(0, 1)


def moved_sides(
    replaced: Replaced, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[tuple[Side, ...], tuple[ForRoles, ...]]:
    """The sides of ``replaced``, for all rows and by role, on ``device`` and, if it is given, in ``dtype``."""

    def here(sides: Sequence[Side]) -> tuple[Side, ...]:
        return tuple(
            Side(*(None if part is None else part.to(device, dtype) for part in (one.down, one.up, one.router)))  # type: ignore[arg-type]
            for one in sides
        )

    by_role = tuple(replace(one, divide=one.divide.to(device), sides=here(one.sides)) for one in replaced.by_role)
    return here(replaced.sides), by_role


def tensors_of_sides(replaced: Replaced) -> dict[str, Tensor]:
    """The sides as they lie on disk, by names that `sides_of` reads."""
    found: dict[str, Tensor] = {}

    def write(prefix: str, sides: Sequence[Side]) -> None:
        for number, side in enumerate(sides):
            parts = {"down": side.down, "up": side.up, "router": side.router}
            found.update({f"{prefix}side{number}_{name}": part for name, part in parts.items() if part is not None})

    write("", replaced.sides)
    for number, one in enumerate(replaced.by_role):
        found |= {f"role{number}_roles": torch.tensor(one.roles), f"role{number}_divide": one.divide}
        write(f"role{number}_", one.sides)
    return found


def sides_of(tensors: Mapping[str, Tensor]) -> tuple[tuple[Side, ...], tuple[ForRoles, ...]]:
    """What `tensors_of_sides` wrote, in float32."""

    def read(prefix: str) -> tuple[Side, ...]:
        sides: list[Side] = []
        while (down := tensors.get(f"{prefix}side{len(sides)}_down")) is not None:
            here = f"{prefix}side{len(sides)}"
            router = tensors.get(f"{here}_router")
            sides.append(Side(down.float(), tensors[f"{here}_up"].float(), None if router is None else router.float()))
        return tuple(sides)

    by_role: list[ForRoles] = []
    while (roles := tensors.get(f"role{len(by_role)}_roles")) is not None:
        here = f"role{len(by_role)}_"
        by_role.append(ForRoles(tuple(roles.tolist()), tensors[f"{here}divide"].float(), read(here)))
    return read(""), tuple(by_role)


def _chosen(of: Sequence[ForRoles], x: Tensor, present: Present | None) -> list[tuple[ForRoles, Chosen]]:
    if present is None or not present.fits(x):
        raise refusal("weights by role")
    return [(one, some) for one in of if (some := present.rows(one.roles)) is not None]


def _rounded(replaced: Replaced, x: Tensor) -> Tensor:
    return replaced.inputs.rounded(x) if replaced.inputs is not None else tokens(x, replaced.activations)


def _divided(replaced: Replaced, x: Tensor, chosen: Sequence[tuple[ForRoles, Chosen]]) -> Tensor:
    divide = replaced.divide
    if chosen:
        # A row has one role, so the order does not matter.
        divide = x.new_ones(x.shape[-1]) if divide is None else divide.to(x.dtype)
        for one, some in chosen:
            divide = torch.where(some.mask, one.divide.to(x.dtype), divide)
        divide = divide.reshape(x.shape)
    return x if divide is None else x / divide.to(x.dtype)
