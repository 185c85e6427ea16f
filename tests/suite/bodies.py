"""The anatomies of the suite: a tiny model of each, and prompts for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import tiny

Sample = tuple[int, int, int]
"""Text tokens before the images, images, text tokens after."""

ONE: list[Sample] = [(3, 1, 6)]
RAGGED: list[Sample] = [(3, 1, 6), (2, 2, 9), (4, 1, 3)]


@dataclass(frozen=True)
class Body:
    """A tiny model and how to prompt it."""

    name: str
    build: Callable[..., Any]
    images: Callable[[int, torch.Generator], dict[str, Tensor]]
    tokens: int
    type_key: str | None = None

    def model(self, **options: Any) -> Any:
        """A fresh model with the same weights every time."""
        return self.build(**options)

    def inputs(self, samples: Sequence[Sample], seed: int = 0) -> dict[str, Tensor]:
        """Left-padded model inputs; pictures and words depend on the seed and the sample's place alone."""
        rows, pictures = [], []
        for place, (before, count, after) in enumerate(samples):
            generator = torch.Generator().manual_seed(seed * 100 + place)
            words = torch.randint(11, tiny.VOCABULARY, (before + count + after,), generator=generator).tolist()
            ids = [1, *words[:before]]
            for image in range(count):
                ids += [tiny.IMAGE] * self.tokens + [words[before + image]]
            rows.append(ids + words[before + count :])
            if count:
                pictures.append(self.images(count, generator))
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.type_key:
            inputs[self.type_key] = (ids == tiny.IMAGE).long()
        for key in pictures[0] if pictures else ():
            inputs[key] = torch.cat([picture[key] for picture in pictures])
        return inputs

    def extended(self, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """The inputs of a prompt that goes on with ``ids`` ``[B, n]``."""
        longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids], dim=1))
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        if self.type_key:
            longer[self.type_key] = (longer["input_ids"] == tiny.IMAGE).long()
        return longer

    def without_pictures(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a later turn, whose images are in the cache."""
        return {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask", self.type_key)}


def _square(size: int) -> Callable[[int, torch.Generator], dict[str, Tensor]]:
    return lambda count, generator: {"pixel_values": torch.randn(count, 3, size, size, generator=generator)}


def _patches(count: int, generator: torch.Generator) -> dict[str, Tensor]:
    return {
        "pixel_values": torch.randn(count * 64, 48, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]] * count),
    }


BODIES = {
    body.name: body
    for body in (
        Body("llava-clip", tiny.llava, _square(32), 16),
        Body("llava-siglip", lambda **options: tiny.llava(vision="siglip", **options), _square(32), 16),
        Body("gemma3", tiny.gemma3, _square(64), 16, "token_type_ids"),
        Body("qwen3_vl", tiny.qwen3_vl, _patches, 16, "mm_token_type_ids"),
    )
}
