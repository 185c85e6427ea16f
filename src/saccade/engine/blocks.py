"""Runs the halves of an encoder block apart, so that rows can go between attention and MLP.

No hook reaches that place: the residual is a local of the block's own forward. The runner is checked against the block at
attach, on random rows, and must give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from saccade.core.errors import SaccadeError
from saccade.models.anatomy import Halves

Middle = Callable[[Tensor], Tensor]
"""What becomes of the rows ``[I, n, D]`` between attention and MLP."""


def forward(halves: Halves, middle: Middle) -> Callable[..., Tensor]:
    """A forward for a block that is made of ``halves``."""

    def run(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        attended = halves.attention(halves.norm1(hidden_states), attention_mask=attention_mask, **kwargs)
        attended = attended[0] if isinstance(attended, tuple) else attended
        x = hidden_states + (attended if halves.scale1 is None else halves.scale1 * attended)
        x = middle(x)
        out = halves.mlp(halves.norm2(x))
        return x + (out if halves.scale2 is None else halves.scale2 * out)

    return run


@torch.no_grad()
def install(block: nn.Module, halves: Halves, middle: Middle) -> Callable[[], None]:
    """Let the runner take the block's place; returns what undoes it.

    Raises:
        SaccadeError: if the runner does not give the block's bits, or something else stands in for its forward.
    """
    name = type(block).__name__
    if "forward" in block.__dict__:
        raise SaccadeError(f"{name}: its forward is replaced already (offloading?), so rows cannot go between its halves")
    parameter = next(block.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, halves.norm1.weight.shape[0], generator=generator).to(parameter.device, parameter.dtype)  # type: ignore[union-attr]
    expected = block(x, None)
    if not isinstance(expected, Tensor) or not torch.equal(forward(halves, lambda rows: rows)(x), expected):
        raise SaccadeError(f"{name}: running its halves apart does not give the same bits, so rows cannot go between them")
    block.__dict__["forward"] = forward(halves, middle)
    return lambda: block.__dict__.pop("forward", None) and None
