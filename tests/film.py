"""A small video file, really encoded."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import torch

SIZE, COUNT, GROUP = 64, 24, 8
"""Pixels of a side, frames, and frames of a group of pictures."""


def write_film(path: Path) -> Path:
    """A square that stands still for a group of pictures, and runs afterwards, on a noisy ground."""
    ground = torch.randint(0, 80, (SIZE, SIZE, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=Fraction(12))
        stream.width = stream.height = SIZE
        stream.pix_fmt, stream.gop_size, stream.max_b_frames, stream.bit_rate = "yuv420p", GROUP, 0, 4_000_000
        for number in range(COUNT):
            picture = ground.clone()
            left = 4 * max(number - GROUP, 0) % 48
            picture[16:32, left : left + 16] = 255
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
