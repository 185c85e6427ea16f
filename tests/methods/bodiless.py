"""What a method may know and see, without a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.items import ItemBatch
from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Signal
from foveate.core.traits import Traits

LLAVA_7B = Fingerprint("llava", 32, 4096, 32064)
LLAVA_13B = Fingerprint("llava", 40, 5120, 32064)
CPU = torch.device("cpu")


def traits(
    fingerprint: Fingerprint = LLAVA_7B, *, artifacts: Mapping[str, Artifact] | None = None, **changed: Any
) -> Traits:
    """LLaVA-1.5's, with its 24 CLIP blocks of which the last but one feeds the projector."""
    known: dict[str, Any] = dict(
        family=fingerprint.family,
        decoder_layers=fingerprint.layers,
        encoder_layers=24,
        feature_layer=22,
        has_cls=True,
        rotary_rows=1,
        mask_free=False,
        fingerprint=fingerprint,
        artifacts=artifacts or {},
    )
    return Traits(**(known | changed))


def images(
    rows: int,
    columns: int,
    number: Sequence[int] = (0,),
    seen: Mapping[Signal, Any] | None = None,
    seed: int = 0,
    **changed: Any,
) -> ItemBatch:
    """Whole images of one grid, the ``number``-th of their prompts, without embeddings unless given."""
    count = len(number)
    known: dict[str, Any] = dict(
        rows=rows,
        columns=columns,
        ordinal=torch.arange(rows * columns).expand(count, -1),
        number=tuple(number),
        seen=seen or {},
        x=torch.zeros(count, rows * columns, 1),
        question=torch.zeros(count, 1, 1),
        companion=(),
        seed=seed,
        device=CPU,
    )
    return ItemBatch(**(known | changed))


def layout(*prompts: str) -> Layout:
    """Prompts of one character a row: ``t`` text, ``1`` ``2`` tokens of the first and second image, ``.`` padding."""
    visual = torch.tensor([[row.isdigit() for row in prompt] for prompt in prompts])
    valid = torch.tensor([[row != "." for row in prompt] for prompt in prompts])
    numbers = [sorted({row for row in prompt if row.isdigit()}) for prompt in prompts]
    items = [[Item(1, prompt.count(n), 0) for n in of_prompt] for prompt, of_prompt in zip(prompts, numbers)]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    return Layout.build(visual, valid, positions[None], items)
