"""What choices are made by, shown to whoever looks.

Methods rank through `foveate.ops.select`, or pass what they rank by through `ranked`; nothing happens where nobody looks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

_SHOW: ContextVar[Callable[[Tensor], None] | None] = ContextVar("show", default=None)


def ranked(scores: Tensor, rows: Tensor | None = None, total: int = 0) -> Tensor:
    """``scores`` ``[B, ..., N]``, unchanged, of all rows at a site (or of those that `about` names).

    Args:
        scores: the larger, the likelier a row is chosen.
        rows: ``[B, N]`` which rows these are, if not all of the ``total``.
        total: rows that there are.
    """
    show = _SHOW.get()
    if show is not None:
        show(scores if rows is None else _spread(scores, rows, total))
    return scores


@contextmanager
def collecting(shape: tuple[int, int], by_head: bool = False) -> Iterator[list[Tensor]]:
    """Collect the scores of rows of ``shape`` ``(B, N)`` that are ranked meanwhile, nan where a row has none.

    What is about anything else is passed over: tokens that were merged on the way, pairs of tokens. Scores ``by_head``
    ``[B, H, N]`` come as the mean over heads.
    """
    found: list[Tensor] = []

    def show(scores: Tensor) -> None:
        if scores.ndim == 3 and by_head:
            scores = scores.mean(1)
        if scores.shape != shape:
            return
        scores = scores.detach().float()
        scores = scores.masked_fill(~scores.isfinite(), float("nan"))
        for place, other in enumerate(found):
            # Pictures of different grids are ranked one after the other.
            if not (scores.isfinite() & other.isfinite()).any():
                found[place] = torch.where(scores.isfinite(), scores, other)
                return
        found.append(scores)

    token = _SHOW.set(show)
    try:
        yield found
    finally:
        _SHOW.reset(token)


@contextmanager
def about(sample: Tensor, rows: Tensor, shape: tuple[int, int]) -> Iterator[None]:
    """Scores that are ranked meanwhile are ``[I, n]``, of ``rows`` ``[I, n]`` of the samples ``[I]``, out of ``(B, N)``."""
    show = _SHOW.get()
    if show is None:
        yield
        return

    def spread(scores: Tensor) -> None:
        if scores.shape == rows.shape:
            full = scores.new_full(shape, float("nan"), dtype=torch.float32)
            full[sample[:, None], rows] = scores.float()
            show(full)

    token = _SHOW.set(spread)
    try:
        yield
    finally:
        _SHOW.reset(token)


def _spread(scores: Tensor, rows: Tensor, total: int) -> Tensor:
    full = scores.new_full((scores.shape[0], total), float("nan"), dtype=torch.float32)
    return full.scatter(1, rows, scores.float())
