"""LLaVA-OneVision: tiled pictures as in LLaVA-NeXT, several pictures without details, videos with pooled frames.

Details beyond ``anyres_max`` tiles and all frames are resized behind the projector, so that a token lies between up to four
cells of the encoder. Rows can therefore go only where tokens are whole (``projected``): a row dropped earlier would leak as
zeros into the tokens around it. Encoder signals are read from the cells that a token lies between.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from foveate.models.anatomy import Anatomy, Picture, View
from foveate.models.decoder import layers_of
from foveate.models.llava import encoder
from foveate.models.llava_next import LINE_END, around, grid_of, laid_out, side, tiles


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``LlavaOnevisionForConditionalGeneration``."""
    config, inner = model.config, model.model
    images = pictures_of(config, inner.pack_image_features)

    def pictures(bound: Mapping[str, Any]) -> list[Picture]:
        if bound.get("pixel_values_videos") is not None:
            videos, frames = bound["pixel_values_videos"].shape[:2]
            return _videos(inner, videos, frames, side(config))
        return images(bound)

    return Anatomy(
        family="llava_onevision",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=layers_of(inner.language_model),
        image_tokens=(config.image_token_id,),
        video_tokens=(config.video_token_id,),
        pictures=pictures,
        encoder=encoder(config, inner, frozenset()),
        config=config.text_config,
    )


def pictures_of(config: Any, pack: Callable[..., Any]) -> Callable[[Mapping[str, Any]], list[Picture]]:
    """`Anatomy.pictures` for pictures alone, of a model that packs features by its method ``pack``."""

    def found(bound: Mapping[str, Any]) -> list[Picture]:
        sizes = torch.as_tensor(bound["image_sizes"]).tolist()
        ratio = bound.get("vision_aspect_ratio") or config.vision_aspect_ratio

        def packed(features: list[Tensor]) -> list[Tensor]:
            rows: list[Tensor] = pack(features, sizes, image_newline=LINE_END, vision_aspect_ratio=ratio)[0]
            return rows

        detailed = _detailed(bound.get("batch_num_images"), len(sizes))
        return laid_out(packed, [tiles(config, size) if cut else None for size, cut in zip(sizes, detailed)], side(config))

    return found


def _detailed(images: Any, count: int) -> list[bool]:
    """Whether each picture is shown in detail: only one that is alone in its prompt, or all if nobody says how many are."""
    if images is None:
        return [True] * count
    return list(itertools.chain.from_iterable([n == 1] * n for n in torch.as_tensor(images).tolist()))


def _videos(inner: Any, videos: int, frames: int, side: int) -> list[Picture]:
    """Videos: pooled frames, one below the other, and a line end."""
    cells = side * side
    pooled = inner.apply_pooling(grid_of(side, side).reshape(1, cells, 2))[0]
    frame = around(pooled, lambda y, x: y * side + x)
    count, columns = len(frame), (side + 1) // 2
    of_frame = torch.arange(frames)[:, None, None] * cells
    one = (frame + of_frame).reshape(frames * count, -1)
    ordinal = torch.arange(frames * count)
    tokens = torch.stack([torch.zeros_like(ordinal), ordinal], dim=1)
    tokens = torch.cat([tokens, torch.full((1, 2), -1)])
    rows = frames * count // columns
    return [Picture((View(rows, columns, frames, one + video * frames * cells),), tokens) for video in range(videos)]
