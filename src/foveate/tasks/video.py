"""What the codec of a video file knows: frames, what changed in them, and how many bytes they took."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.errors import FoveateError


@dataclass(frozen=True)
class Video:
    """Sampled frames of a file, with the side data of its codec.

    Attributes:
        frames: ``[T, H, W, 3]`` uint8, as processors take them.
        seconds: ``[T]`` when each is shown.
        residual: ``[T, 3, H, W]`` float32: what the frame adds to the one before it in the file; of a frame that the codec
            predicts from none, what a Laplacian leaves of it. Both stand for the codec's own residual, which decoders keep.
        packet_size: ``[T]`` mean bytes of a packet in the group of pictures that the frame belongs to.
    """

    frames: Tensor
    seconds: Tensor
    residual: Tensor
    packet_size: Tensor

    @property
    def side(self) -> dict[str, list[Any]]:
        """Side data of this video, the only one of its prompt: ``session.side(videos=video.side)``."""
        return {"residual": [self.residual], "packet_size": [self.packet_size]}


def read_video(path: str | Path, frames: int) -> Video:
    """Read ``frames`` frames, evenly spread over a video file.

    Raises:
        FoveateError: without PyAV, for a file that is none or cannot be read, and if it has fewer frames.
    """
    try:
        import av
    except ImportError as error:
        raise FoveateError('video: needs PyAV; run pip install "foveate[video]"') from error
    if frames < 1:
        raise FoveateError(f"frames={frames}: must be 1 or more")
    try:
        with av.open(str(path)) as container:
            sizes = _sizes(container)
        if len(sizes) < frames:
            raise FoveateError(f"frames={frames}: {str(path)!r} has {len(sizes)}; ask for no more")
        times = sorted(sizes)
        wanted = {times[i * (len(times) - 1) // max(frames - 1, 1)] for i in range(frames)}
        found, shown, changed = list[tuple[float, float]](), list[Tensor](), list[Tensor]()
        with av.open(str(path)) as container:
            before: Tensor | None = None
            for frame in container.decode(video=0):
                pixels = torch.from_numpy(frame.to_ndarray(format="rgb24"))
                if frame.pts in wanted:
                    found.append((float(frame.time or 0), sizes[frame.pts]))
                    shown.append(pixels)
                    changed.append(_residual(pixels, None if frame.key_frame else before))
                before = pixels
    except (av.FFmpegError, OSError) as error:
        raise FoveateError(f"video={str(path)!r}: cannot be read ({error})") from error
    if len(found) < frames:
        raise FoveateError(f"video={str(path)!r}: {frames - len(found)} of its frames cannot be decoded; encode it anew")
    seconds, bytes_ = torch.tensor(found, dtype=torch.float64).unbind(1)
    return Video(torch.stack(shown), seconds, torch.stack(changed), bytes_)


def _sizes(container: Any) -> dict[int, float]:
    """By a frame's time stamp: mean bytes of the packets in its group of pictures, which a key frame begins."""
    groups: list[list[Any]] = []
    for packet in container.demux(video=0):
        if packet.size and packet.pts is not None:
            if packet.is_keyframe or not groups:
                groups.append([])
            groups[-1].append(packet)
    means = [sum(packet.size for packet in group) / len(group) for group in groups]
    return {packet.pts: mean for group, mean in zip(groups, means) for packet in group}


def _residual(pixels: Tensor, before: Tensor | None) -> Tensor:
    """``[3, H, W]`` what ``pixels`` ``[H, W, 3]`` add to the frame before, or to their surroundings."""
    now = pixels.permute(2, 0, 1).float()
    if before is not None:
        return now - before.permute(2, 0, 1).float()
    around = functional.pad(now[None], (1, 1, 1, 1), mode="replicate")[0]
    mean = (around[:, :-2, 1:-1] + around[:, 2:, 1:-1] + around[:, 1:-1, :-2] + around[:, 1:-1, 2:]) / 4
    return now - mean
