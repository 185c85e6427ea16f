"""Streams: pictures that keep coming, and questions about them at any time."""

from foveate.streams.stream import Stream, stream

__all__ = ["Stream", "stream"]
