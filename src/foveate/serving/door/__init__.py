"""The door of a server: what a request may bring in, and what is counted on its way out.

A pure ASGI middleware, the same in front of vLLM (``--middleware foveate.serving.door.Door``) and of the fallback on
transformers. Docs: ``docs/serving.md``.
"""

from foveate.serving.door.door import Door

__all__ = ["Door"]
