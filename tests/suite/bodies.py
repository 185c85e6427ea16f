"""The anatomies of the suite: a tiny model of each, and prompts for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import several, tiny

Sample = tuple[int, int, int]
"""Text tokens before the images, images, text tokens after."""

Size = tuple[int, int]
"""Height and width of an image in pixels, as it was before it was cut into tiles."""

ONE: list[Sample] = [(3, 1, 6)]
RAGGED: list[Sample] = [(3, 1, 6), (2, 2, 9), (4, 1, 3)]


@dataclass(frozen=True)
class Body:
    """A tiny model and how to prompt it.

    Attributes:
        name: what the suite calls it.
        build: makes the model.
        images: model inputs that show images of some sizes, drawn by a generator.
        tokens: visual tokens of an image of the usual size.
        type_key: model input that marks placeholders, if there is one.
        size: the usual size.
        views: tokens of each grid of an image of the usual size.
        token: what holds their place.
        count: placeholders of an image of some size; None: as many as `tokens`, whatever the size.
        bounds: tokens before and behind the placeholders of an image, where the model goes by them.
        frames: of the videos that it is shown, if it is shown any.
        sees: whether it is shown any pictures; if not, words stand in their places.
    """

    name: str
    build: Callable[..., Any]
    images: Callable[[Sequence[Size], torch.Generator], dict[str, Tensor]]
    tokens: int
    type_key: str | None = None
    size: Size = (32, 32)
    count: Callable[[Size], int] | None = None
    views: tuple[int, ...] = (16,)
    token: int = tiny.IMAGE
    bounds: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    frames: int = 1
    sees: bool = True

    def model(self, **options: Any) -> Any:
        """A fresh model with the same weights every time."""
        return self.build(**options)

    def placeholders(self, size: Size | None = None) -> int:
        """Placeholders of an image: its visual tokens and the rows that end its lines."""
        return self.count(size or self.size) if self.count else self.tokens

    def inputs(
        self, samples: Sequence[Sample], seed: int = 0, sizes: Sequence[Size] = (), only: int | None = None
    ) -> dict[str, Tensor]:
        """Left-padded model inputs; pictures and words depend on the seed and the sample's place alone.

        The images of each sample have ``sizes`` in turn (the usual one if there are none). ``only`` picks one sample, which
        then comes without padding.
        """
        sizes = sizes or (self.size,)
        rows, pictures = [], []
        for place, (before, count, after) in enumerate(samples):
            if only not in (None, place):
                continue
            generator = torch.Generator().manual_seed(seed * 100 + place)
            words = torch.randint(11, tiny.VOCABULARY, (before + count + after,), generator=generator).tolist()
            ids = [1, *words[:before]]
            mine = [sizes[image % len(sizes)] for image in range(count)]
            for image, size in enumerate(mine):
                start, end = self.bounds
                if not self.sees:
                    ids += torch.randint(11, tiny.VOCABULARY, (self.tokens,), generator=generator).tolist()
                    continue
                ids += [*start, *[self.token] * self.placeholders(size), *end, words[before + image]]
            rows.append(ids + words[before + count :])
            pictures.append(self.images(mine, generator))
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self.type_key:
            inputs[self.type_key] = types(ids)
        if bool((ids == self.token).any()):
            for key in pictures[0]:
                inputs[key] = joined([picture[key] for picture in pictures])
        return inputs

    def extended(self, inputs: dict[str, Tensor], ids: Tensor) -> dict[str, Tensor]:
        """The inputs of a prompt that goes on with ``ids`` ``[B, n]``."""
        longer = dict(inputs, input_ids=torch.cat([inputs["input_ids"], ids], dim=1))
        longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(ids)], dim=1)
        if self.type_key:
            longer[self.type_key] = types(longer["input_ids"])
        return longer

    def without_pictures(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a later turn, whose images are in the cache."""
        return {key: value for key, value in inputs.items() if key in ("input_ids", "attention_mask", self.type_key)}


def types(ids: Tensor) -> Tensor:
    """What marks placeholders: 1 for those of images, 2 for those of videos."""
    return (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long()


def joined(of_samples: list[Tensor]) -> Tensor:
    """One input of all samples; along the second dimension (images of a sample, tiles of an image) padded with zeros."""
    if of_samples[0].ndim < 4:
        return torch.cat(of_samples)
    most = max(tensor.shape[1] for tensor in of_samples)
    return torch.cat([_padded(tensor, most) for tensor in of_samples])


def _padded(tensor: Tensor, most: int) -> Tensor:
    out = tensor.new_zeros(tensor.shape[0], most, *tensor.shape[2:])
    out[:, : tensor.shape[1]] = tensor
    return out


def _square(size: int) -> Callable[[Sequence[Size], torch.Generator], dict[str, Tensor]]:
    """Images that the model sees as one square each."""
    return lambda sizes, generator: {"pixel_values": torch.randn(len(sizes), 3, size, size, generator=generator)}


def _patches(sizes: Sequence[Size], generator: torch.Generator) -> dict[str, Tensor]:
    count = len(sizes)
    return {
        "pixel_values": torch.randn(count * 64, 48, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8]]).repeat(count, 1),
    }


def _videos(sizes: Sequence[Size], generator: torch.Generator) -> dict[str, Tensor]:
    """Four frames of 2x2 tokens each."""
    count = len(sizes)
    return {
        "pixel_values_videos": torch.randn(count * 64, 48, generator=generator),
        "video_grid_thw": torch.tensor([[4, 4, 4]]).repeat(count, 1),
    }


TILES = {(20, 64): (1, 2), (64, 20): (2, 1), (40, 64): (2, 2), (64, 64): (2, 2), (1, 64): (1, 2), (64, 1): (2, 1)}
"""Tiles of 32 pixels that show the details of an image of some sizes (what the pinpoints of the tiny models lead to)."""
NEXT = {(20, 64): (2, 8), (64, 20): (8, 2), (40, 64): (6, 8), (64, 64): (8, 8), (1, 64): (0, 8), (64, 1): (8, 0)}
"""Cells of the details once the borders are cut off; each line has an end."""
ONEVISION = {**NEXT, (40, 64): (4, 6), (64, 64): (5, 5)}
"""The same, where more cells than two tiles have are resized to about as many."""


def _tiled(sizes: Sequence[Size], generator: torch.Generator) -> dict[str, Tensor]:
    """An overview and the details, padded to the image with the most tiles."""
    counts = [1 + TILES[size][0] * TILES[size][1] for size in sizes]
    pixels = [torch.randn(1, count, 3, 32, 32, generator=generator) for count in counts]
    most = max(counts, default=1)
    return {
        "pixel_values": torch.cat([_padded(tiles, most) for tiles in pixels]) if sizes else torch.zeros(0, most, 3, 32, 32),
        "image_sizes": torch.tensor(sizes, dtype=torch.long).reshape(-1, 2),
    }


def _tiled_count(details: dict[Size, Size]) -> Callable[[Size], int]:
    return lambda size: 16 + details[size][0] * (details[size][1] + 1)


def _flat_tiles(sizes: Sequence[Size], generator: torch.Generator) -> dict[str, Tensor]:
    """InternVL: tiles of 64 pixels, those of all images one after the other."""
    count = sum(_tiles_of_64(size) for size in sizes)
    return {"pixel_values": torch.randn(count, 3, 64, 64, generator=generator)}


def _listed_tiles(sizes: Sequence[Size], generator: torch.Generator) -> dict[str, Tensor]:
    """Idefics3: tiles of 64 pixels by sample, with a mask of real pixels."""
    count = sum(_tiles_of_64(size) for size in sizes)
    return {
        "pixel_values": torch.randn(1, count, 3, 64, 64, generator=generator),
        "pixel_attention_mask": torch.ones(1, count, 64, 64, dtype=torch.long),
    }


def _tiles_of_64(size: Size) -> int:
    return size[0] * size[1] // 64**2


def _count_of_64(size: Size) -> int:
    return 16 * _tiles_of_64(size)


BODIES = {
    body.name: body
    for body in (
        Body("llava-clip", tiny.llava, _square(32), 16),
        Body("llava-siglip", lambda **options: tiny.llava(vision="siglip", **options), _square(32), 16),
        Body("gemma3", tiny.gemma3, _square(64), 16, "token_type_ids"),
        Body("qwen2_vl", tiny.qwen2_vl, _patches, 16, "mm_token_type_ids"),
        Body("qwen2_5_vl", tiny.qwen2_5_vl, _patches, 16, "mm_token_type_ids"),
        Body("qwen2_5_omni_thinker", tiny.qwen2_5_omni, _patches, 16, bounds=((8,), (9,))),
        Body("qwen3_vl", tiny.qwen3_vl, _patches, 16, "mm_token_type_ids"),
        Body("llava_next", tiny.llava_next, _tiled, 32, size=(20, 64), count=_tiled_count(NEXT), views=(16, 16)),
        Body(
            "llava_onevision", tiny.llava_onevision, _tiled, 32, size=(20, 64), count=_tiled_count(ONEVISION), views=(16, 16)
        ),
        Body("internvl", tiny.internvl, _flat_tiles, 16, size=(64, 64), count=_count_of_64),
        Body("idefics3", tiny.idefics3, _listed_tiles, 16, size=(64, 64), count=_count_of_64),
        Body("smolvlm", tiny.smolvlm, _listed_tiles, 16, size=(64, 64), count=_count_of_64),
        Body("qwen3_vl_moe", tiny.qwen3_vl_moe, _patches, 16, "mm_token_type_ids"),
        Body("qwen3_5", tiny.qwen3_5, _patches, 16, "mm_token_type_ids"),
    )
}
# Not Qwen2.5-VL: transformers' own later turns number their text differently behind a video.
FILMS = {
    "qwen2_vl-video": Body("qwen2_vl-video", tiny.qwen2_vl, _videos, 16, "mm_token_type_ids", token=tiny.VIDEO, frames=4)
}
"""The same, shown videos instead of images: for methods that look from one frame to the next."""
TEXTS = {
    body.name: body
    for body in (
        Body("text", tiny.text, lambda sizes, generator: {}, 16, sees=False),
        Body(
            "text-moe", lambda **options: tiny.text(kind="qwen3_moe", **options), lambda sizes, generator: {}, 16, sees=False
        ),
    )
}
"""Text models, whose prompts are as long as those of the others."""
SEVERAL = Body("several", tiny.several, _square(32), several.COUNT, views=(16, 9))
"""A family of several encoders: for methods that act in and between them."""
