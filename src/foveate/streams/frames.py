"""Frames of a video file, or of a camera, one after the other; none is kept."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from PIL import Image

from foveate.core.errors import FoveateError

CAMERA = "camera:"
"""In front of a camera's number, in the place of a file's name."""
_CAMERAS = {"linux": ("v4l2", "/dev/video{}"), "darwin": ("avfoundation", "{}")}


def frames(source: str, per_second: float) -> Iterator[tuple[float, Image.Image]]:
    """Seconds and picture of every frame of ``source`` (a video file, or ``camera:0``), at most ``per_second`` of them.

    Raises:
        FoveateError: without PyAV, and where the source cannot be opened or read.
    """
    if not per_second > 0:
        raise FoveateError(f"fps={per_second:g}: must be above 0")
    try:
        import av
    except ImportError as error:
        raise FoveateError('video: needs PyAV; run pip install "foveate[video]"') from error
    kind, place = _place(source)
    try:
        with av.open(place, format=kind) as container:
            if not container.streams.video:
                raise FoveateError(f"video={source!r}: has no pictures; give a video file, or camera:0")
            first, due = None, 0.0
            for frame in container.decode(video=0):
                seconds = float(frame.time or 0.0)
                first = seconds if first is None else first
                # Half a thousandth of a second is what time stamps are rounded by.
                if seconds - first >= due - 5e-4:
                    due += 1 / per_second
                    yield seconds - first, frame.to_image()
    except (av.FFmpegError, OSError) as error:
        raise FoveateError(f"video={source!r}: cannot be read ({error})") from error


def _place(source: str) -> tuple[str | None, str]:
    """How PyAV opens a source: its format, if it has to be told, and its name."""
    if not source.startswith(CAMERA):
        return None, source
    number = source.removeprefix(CAMERA)
    if not number.isdecimal():
        raise FoveateError(f"video={source!r}: must be camera: and the camera's number, such as camera:0")
    if sys.platform not in _CAMERAS:
        raise FoveateError(f"video={source!r}: cameras are read on Linux and macOS; give a video file")
    kind, name = _CAMERAS[sys.platform]
    return kind, name.format(number)
