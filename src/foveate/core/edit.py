"""What a method does to the rows at a site."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.core.positions import Positions, TextAfter
from foveate.core.reduction import Reduction


@dataclass(frozen=True)
class Edit:
    """A `Reduction` and what a linear map cannot say.

    Attributes:
        reduction: maps the site's rows to the rows that go on. Text rows stay, in their order.
        positions: rotary positions of the rows that go on: ``"anchor"`` keeps the anchors' own, ``"contiguous"`` renumbers
            them without gaps (later text follows), ``"rank"`` does so for each axis of each item, as if the grid had been
            smaller, ``"auto"`` is contiguous where positions are one row and anchor under M-RoPE. A tensor ``[R, B, k]``
            sets them; R may be a multiple K of the model's own rows, the K-th part of each axis' frequencies then turns
            by the K-th row of that axis (see `foveate.methods.before_llm.ppe`).
        text_after: with ``"anchor"``, text behind an item keeps its positions, or follows the largest one kept.
        values: ``[B, k, D]`` replaces what the reduction makes of the hidden states (a result that is not linear).
        key_bias: ``[B, k]`` added to the attention logits of the rows as keys, from here on; at encoder sites only.
        all_layers: whether the rows that go are cut from the caches of earlier layers, too; at decoder sites only.
        live: rows that go on in each sample, padding not counted, where the method knows them (saves a host sync).
        visual: the same for visual rows.
        by_item: the same for visual rows of each item of each sample.
        inserted: ``[B, k]`` bool: rows that are put in between the others, which stay in their order. They have the role of
            that name, the anchors' positions, and the number of the row in front of them, which does not see them. Only for
            methods that say so (`foveate.core.method.Tokens.inserts`), at decoder sites.
    """

    reduction: Reduction
    positions: Positions | Tensor = "anchor"
    text_after: TextAfter = "keep"
    values: Tensor | None = None
    key_bias: Tensor | None = None
    all_layers: bool = False
    live: tuple[int, ...] | None = None
    visual: tuple[int, ...] | None = None
    by_item: tuple[tuple[int, ...], ...] | None = None
    inserted: Tensor | None = None
