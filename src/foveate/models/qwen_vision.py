"""What the Qwen families share: images of any size as one sequence of patches, groups of them merged to a token, M-RoPE.

The vision tower gets the patches of all images (or of all frames of all videos) as one sequence ``[P, C * T * p * p]``.
Within a frame they come cell by cell, in raster order of the cells; the ``merge * merge`` patches of a cell, which the
merger makes one token of, lie together. So the patches of token i are rows ``merge**2 * i`` onwards, over all images. All
numbers of rows below are places in that sequence, the tower's input order.

Attention is within segments (a frame each, or a window each in Qwen2.5-VL), as ``cu_seqlens`` has them. Under every kernel
but FlashAttention an attention module calls the attention function once for each segment, in the order of the rows, with
queries, keys and values ``[1, H, n_segment, d]`` and no mask. What a probe sees in the calls of one layer, joined in order,
are thus the rows that the block works on; the softmax of each is over its own segment only. FlashAttention is called once,
with all rows and the boundaries as ``cu_seq_lens_q``.

Only some cells can be encoded, because the towers take by keyword what they otherwise derive from ``grid_thw``: rotary
positions, segments, windows, and which learned position embeddings to mix. `Patches.keep` fills in all of these, so that the
tower reads the (full) ``grid_thw`` no more; that waits for the device where the tower itself would have, and once more for
each set of boundaries.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.vision_utils import (
    get_vision_cu_seqlens,
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from foveate.models.anatomy import Anatomy, Encoder, Patches, Picture, View

Tables = Callable[[Tensor, dict[str, Any], Tensor], dict[str, Tensor]]
"""Given the grids, the tower's call (what is precomputed there is taken out) and the cells: keywords for these cells."""


def qwen(model: Any, encoder: Encoder) -> Anatomy:
    """Anatomy of a Qwen model with the given vision encoder."""
    config, inner = model.config, model.model
    return Anatomy(
        family=config.model_type,
        model=model,
        multimodal=inner,
        vision=inner.visual,
        language_model=inner.language_model,
        layers=inner.language_model.layers,
        image_tokens=(config.image_token_id,),
        video_tokens=(config.video_token_id,),
        pictures=pictures(config.vision_config.spatial_merge_size),
        encoder=encoder,
        rotary_rows=3,
        config=config.text_config,
    )


def pictures(merge: int) -> Callable[[Mapping[str, Any]], list[Picture]]:
    """`Anatomy.pictures` of a tower that makes a token of ``merge * merge`` patches."""

    def found(bound: Mapping[str, Any]) -> list[Picture]:
        made, patches = [], 0
        for frames, height, width in grids(bound).tolist():
            count = frames * height * width
            cells = torch.arange(patches, patches + count).reshape(-1, merge * merge)
            # Frames of a video lie one below the other in a single grid.
            made.append(Picture((View(frames * height // merge, width // merge, frames, cells),)))
            patches += count
        return made

    return found


def grids(bound: Mapping[str, Any]) -> Tensor:
    """``[I, 3]`` frames, rows and columns of patches of each image or video that the feature call encodes."""
    images: Tensor | None = bound.get("image_grid_thw")
    return bound["video_grid_thw"] if images is None else images


def packed(
    tower: Any,
    tables: Tables = lambda grid, call, cells: {},
    order: Callable[[Mapping[str, Any], int], Tensor | None] = lambda bound, layer: None,
) -> Encoder:
    """The parts of a Qwen vision tower, given what it reads by keyword beside rotary positions and segments."""
    return Encoder(
        blocks=tower.blocks,
        attention=[block.attn for block in tower.blocks],
        feature_layer=len(tower.blocks) - 1,
        prefix=0,
        projector=tower.merger,
        sites=frozenset({"patches"}),
        packed=True,
        order=order,
        patches=_patches(tower.config, tables),
    )


def rows_of(cells: Tensor, unit: int) -> Tensor:
    """``[n * unit]`` rows of the patches of ``cells`` ``[n]``."""
    return (cells[:, None] * unit + torch.arange(unit, device=cells.device)).flatten()


def boundaries(full: Tensor, kept: Tensor, unit: int) -> Tensor:
    """Boundaries of the segments that are not empty once only the cells at ``kept`` ``[n]`` (ascending) are there.

    Both ``full`` and the result count rows, ``unit`` for each cell, as FlashAttention's ``cu_seqlens`` do.
    """
    before = torch.searchsorted(kept, (full // unit).to(kept))
    left: Tensor = torch.unique_consecutive(before * unit)
    return left.to(full.dtype)


def interpolated(tower: Any) -> Tables:
    """Tables of a tower that mixes learned position embeddings, four for each patch."""

    def tables(grid: Tensor, call: dict[str, Any], cells: Tensor) -> dict[str, Tensor]:
        merge = tower.config.spatial_merge_size
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=tower.num_grid_per_side,
            mode=tower.interpolation_mode,
            align_corners=tower.interpolation_align_corners,
            spatial_merge_size=merge,
            kwargs=call,
        )
        rows = rows_of(cells, merge**2)
        return {"interp_indices": indices.to(cells.device)[rows], "interp_weights": weights.to(cells.device)[rows]}

    return tables


def _patches(vision: Any, tables: Tables) -> Patches:
    merge, size, channels = vision.spatial_merge_size, vision.patch_size, vision.in_channels
    cell = (channels, merge * size, merge * size)

    def read(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        pixels: Tensor = _call(args, kwargs)["hidden_states"]
        cells = pixels.reshape(-1, merge, merge, channels, vision.temporal_patch_size, size, size)
        # Of the frames that make a patch the first is shown; those of an image are copies.
        return cells[:, :, :, :, 0].permute(0, 3, 1, 4, 2, 5).reshape(-1, *cell)

    def keep(args: tuple[Any, ...], kwargs: Mapping[str, Any], cells: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
        call = _call(args, kwargs)
        grid, rows = call["grid_thw"], rows_of(cells, merge**2)
        positions = get_vision_position_ids(grid, merge, kwargs=call).to(cells.device)
        segments = get_vision_cu_seqlens(grid, kwargs=call).to(cells.device)
        call |= tables(grid, call, cells)
        for longest in ("max_seqlen", "max_window_seqlen"):
            call.pop(longest, None)
        return (), dict(
            call,
            hidden_states=call["hidden_states"][rows],
            position_ids=positions[rows],
            cu_seqlens=boundaries(segments, cells, merge**2),
        )

    return Patches(cell=cell, read=read, keep=keep, merge=merge)


def _call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's arguments by name."""
    return dict(zip(("hidden_states", "grid_thw"), args)) | dict(kwargs)
