"""Streams: pictures that keep coming, and questions about them at any time."""

from foveate.streams.session import Stream, stream

__all__ = ["Stream", "stream"]
