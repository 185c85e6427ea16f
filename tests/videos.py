"""Prompts with videos, for tiny models."""

from __future__ import annotations

import torch
from torch import Tensor

from tests import tiny


def qwen_pixels(frames: Tensor) -> Tensor:
    """Patches ``[P, 48]`` of frames ``[T, 3, H, W]``, cell by cell, as Qwen's processors lay them out."""
    count, _, height, width = frames.shape
    cells = frames.reshape(count, 3, height // 8, 2, 4, width // 8, 2, 4)
    return cells.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 48)


def prompt(family: str, videos: Tensor, words: int = 6) -> dict[str, Tensor]:
    """One prompt that shows ``videos`` ``[V, T, 3, H, W]`` (Qwen: multiples of 8 pixels; LLaVA-OneVision: 32 x 32)."""
    count, frames, _, height, width = videos.shape
    text = torch.randint(11, tiny.VOCABULARY, (words + count,), generator=torch.Generator().manual_seed(0)).tolist()
    inputs: dict[str, Tensor] = {"pixel_values_videos": videos}
    cells = (height // 8) * (width // 8)
    if family == "llava_onevision":
        runs = [[tiny.VIDEO] * (frames * 4 + 1)]  # pooled to 2 x 2, and a line end
    else:
        inputs["pixel_values_videos"] = torch.cat([qwen_pixels(video) for video in videos])
        inputs["video_grid_thw"] = torch.tensor([[frames, height // 4, width // 4]]).repeat(count, 1)
        # Qwen3-VL tells the time in front of each frame.
        apart = family.startswith("qwen3")
        runs = [[tiny.VIDEO] * cells] * frames if apart else [[tiny.VIDEO] * (frames * cells)]
    ids = [1]
    for video in range(count):
        for run in runs:
            ids += [text[video], *run]
    ids += text[count:]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if family != "llava_onevision":
        inputs["mm_token_type_ids"] = 2 * (inputs["input_ids"] == tiny.VIDEO).long()
    return inputs
