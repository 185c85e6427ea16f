"""Runs the halves of an encoder block apart, so that rows can go between attention and MLP.

No hook reaches that place: the residual is a local of the block's own forward. The runner is checked against the block at
attach, on random rows, and must give the same bits.
"""

from __future__ import annotations

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


@torch.no_grad()
def install(block: nn.Module, halves: Callable[[nn.Module], Halves], middle: Middle) -> Callable[[], None]:
    """Let the runner take the block's place, inside of accelerate's hooks if it has any; returns what undoes it.

    ``middle`` must leave rows alone while this runs.

    Raises:
        FoveateError: if the runner does not give the block's bits, or something else stands in for its forward.
    """
    name, norm = type(block).__name__, halves(block).norm1.weight
    hooked = hasattr(block, "_hf_hook")  # accelerate's own forward then calls the block's by this name
    place = "_old_forward" if hooked else "forward"
    own = block.__dict__.get(place)
    # A copy of an attached model carries the class's own forward there.
    if not hooked and own is not None and getattr(own, "__func__", None) is not type(block).forward:
        raise FoveateError(f"{name}: something else stands in for its forward, so rows cannot go between its halves")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, norm.shape[0], generator=generator)  # type: ignore[union-attr, arg-type]
    x = x.to(norm.dtype) if hooked else x.to(norm)  # type: ignore[arg-type]
    expected = block(x, None)
    undo = stand_in(block, place, forward, block, halves, middle)
    if not isinstance(expected, Tensor) or not torch.equal(block(x, None), expected):
        undo()
        raise FoveateError(f"{name}: running its halves apart does not give the same bits, so rows cannot go between them")
    return undo
