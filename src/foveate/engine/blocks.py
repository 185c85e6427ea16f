"""Runs the halves of an encoder block apart, so that rows can go between attention and MLP.

No hook reaches that place: the residual is a local of the block's own forward. The runner is checked against the block at
attach, on random rows, and must give the same bits.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.errors import FoveateError
from foveate.engine.stand_in import stand_in
from foveate.models.anatomy import Halves

Middle = Callable[[Tensor], Tensor]
"""What becomes of the rows ``[I, n, D]`` between attention and MLP."""


def forward(
    block: nn.Module,
    halves: Callable[[nn.Module], Halves],
    middle: Middle,
    original: Callable[..., Tensor],
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Run ``block``, which ``halves`` takes apart, in the place of its ``original`` forward."""
    parts = halves(block)  # anew each time: accelerate may only now have loaded the block's own parameters
    attended = parts.attention(parts.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
    attended = attended[0] if isinstance(attended, tuple) else attended
    x = hidden_states + (attended if parts.scale1 is None else parts.scale1 * attended)
    x = middle(x)
    out = parts.mlp(parts.norm2(x))
    return x + (out if parts.scale2 is None else parts.scale2 * out)


def install(block: nn.Module, halves: Callable[[nn.Module], Halves], middle: Middle) -> Callable[[], None]:
    """Let the runner take the block's place, inside of accelerate's hooks if it has any; returns what undoes it.

    ``middle`` must leave rows alone while this runs.

    Raises:
        FoveateError: if the runner does not give the block's bits, or something else stands in for its forward.
    """
    return inside(block, halves(block).norm1, "rows cannot go between its halves", forward, halves, middle)


@torch.no_grad()
def inside(block: nn.Module, norm: nn.Module, lost: str, function: Callable[..., Any], *given: Any) -> Callable[[], None]:
    """Let ``function(block, *given, original, ...)`` stand in for a block's forward, inside of accelerate's hooks.

    Args:
        block: of an encoder.
        norm: its first norm, for the kind of rows that it takes.
        lost: what cannot be, if this is refused.
        function: gives the block's bits as long as no call goes on.
        given: to the function.

    Raises:
        FoveateError: if it does not give the block's bits, or something else stands in for its forward.
    """
    name, weight = type(block).__name__, norm.weight
    hooked = hasattr(block, "_hf_hook")  # accelerate's own forward then calls the block's by this name
    place = "_old_forward" if hooked else "forward"
    own = block.__dict__.get(place)
    # A copy of an attached model carries the class's own forward there.
    if not hooked and own is not None and getattr(own, "__func__", None) is not type(block).forward:
        raise FoveateError(f"{name}: something else stands in for its forward, so {lost}")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, weight.shape[0], generator=generator)  # type: ignore[union-attr, arg-type]
    x = x.to(weight.dtype) if hooked else x.to(weight)  # type: ignore[arg-type]
    unmasked = {"attention_mask": None} if "attention_mask" in inspect.signature(type(block).forward).parameters else {}
    expected = block(x, **unmasked)
    undo = stand_in(block, place, function, block, *given)
    if not isinstance(expected, Tensor) or not torch.equal(block(x, **unmasked), expected):
        undo()
        raise FoveateError(f"{name}: taking it apart does not give the same bits, so {lost}")
    return undo
