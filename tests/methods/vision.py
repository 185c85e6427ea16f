"""Rows of images, as methods see them inside the encoder and behind it, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.roles import Item, Role


def vision_layout(counts: Sequence[int], cls: bool = True, gaps: Sequence[Sequence[int]] | None = None) -> Layout:
    """Images of ``counts[i]`` tokens in one line, behind a CLS row or without it.

    Shorter ones are padded at the end, or so that the rows ``gaps[i]`` are padding.
    """
    width = int(cls) + max(count + len(gaps[i]) if gaps else count for i, count in enumerate(counts))
    valid = torch.zeros(len(counts), width, dtype=torch.bool)
    for image, count in enumerate(counts):
        rows = [row for row in range(width) if not (gaps and row in gaps[image])]
        valid[image, rows[: count + int(cls)]] = True
    visual = valid.clone()
    visual[:, : int(cls)] = False
    items = [[Item(1, count, image)] for image, count in enumerate(counts)]
    built = Layout.build(visual, valid, torch.zeros(1, *valid.shape, dtype=torch.long), items)
    role = built.role.clone()
    role[:, : int(cls)] = int(Role.CLS)
    return replace(built, role=role)


def only(x: Tensor, layout: Layout, image: int) -> Tensor:
    """The rows ``[1, n, ...]`` of one image that are no padding."""
    return x[image, layout.valid[image]][None]
