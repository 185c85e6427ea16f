"""Makes a recipe run inside a Hugging Face model."""

from saccade.engine.session import Session, attach

__all__ = ["Session", "attach"]
