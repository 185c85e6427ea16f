"""What travels with a picture through vLLM: its keep, to the worker; and with each row that stays, its place in the grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from foveate.serving.settings import FULL, Keep
from foveate.serving.ticket import KEEP

FIELD = KEEP
"""A picture's keep among its fields: ``[count, share, counted]``, of which the first two are 0 for all tokens."""

DUMMY = "foveate_dummy"
"""Keyword of the pictures by which vLLM measures its memory."""

COLUMNS, BASE = 6, 256
"""A place is three numbers, each as ``(n // 256, n % 256)``: bfloat16 has whole numbers to 256."""


def packed(keep: Keep, counted: bool = True) -> Tensor:
    """A keep as the numbers of `FIELD`, ``[1, 3]``; ``counted``: whether metrics are to know of it."""
    count, share = (0, 0.0) if keep == FULL else (keep, 0.0) if isinstance(keep, int) else (0, keep)
    return torch.tensor([[count, share, counted]], dtype=torch.float64)


def unpacked(numbers: Tensor) -> tuple[Keep, bool]:
    """What `packed` packed, of one picture."""
    count, share, counted = numbers.tolist()
    return int(count) or share or FULL, bool(counted)


def ours(options: Mapping[str, object]) -> tuple[dict[str, object], Keep, bool]:
    """A processor's options without ours, the keep, and whether they are of dummies."""
    rest = {name: value for name, value in options.items() if name not in (KEEP, DUMMY)}
    return rest, options.get(KEEP, FULL), bool(options.get(DUMMY, False))  # type: ignore[return-value]


def with_places(rows: Tensor, place: Tensor) -> Tensor:
    """Rows ``[k, D]`` with their places ``[k, 3]`` behind them: ``[k, D + 6]``."""
    return torch.cat([rows, torch.cat([place // BASE, place % BASE], dim=1).to(rows.dtype)], dim=1)


def apart(rows: Tensor) -> tuple[Tensor, Tensor]:
    """What `with_places` joined."""
    high, low = rows[:, -COLUMNS:].round().long().chunk(2, dim=1)
    return rows[:, :-COLUMNS], high * BASE + low


def stretched(
    tokens: Sequence[int], spans: Sequence[tuple[int, int, int | None]]
) -> tuple[list[int], list[tuple[int, int]], Tensor]:
    """A prompt as if nothing had been dropped of its pictures.

    Args:
        tokens: of the prompt.
        spans: of each picture or video, in order: where it begins, how many placeholders there are, and how many a picture
            had; None for videos, which are whole.

    Returns:
        The tokens of the whole prompt; where in it each picture or video begins, and how long it is; where each of the
        ``tokens`` stands there, those of a picture all where it begins.
    """
    whole, found, columns, done = list[int](), list[tuple[int, int]](), list[Tensor](), 0
    for start, length, full in spans:
        columns.append(len(whole) + torch.arange(start - done))
        whole += tokens[done:start]
        begin, done = len(whole), start + length
        columns.append(begin + (torch.arange(length) if full is None else torch.zeros(length, dtype=torch.long)))
        whole += tokens[start:done] if full is None else [tokens[start]] * full
        found.append((begin, len(whole) - begin))
    columns.append(len(whole) + torch.arange(len(tokens) - done))
    return whole + list(tokens[done:]), found, torch.cat(columns)
