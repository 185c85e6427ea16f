"""Makes a recipe run inside a Hugging Face model."""

from foveate.engine.companion import ClipCompanion
from foveate.engine.session import Session, attach

__all__ = ["ClipCompanion", "Session", "attach"]
