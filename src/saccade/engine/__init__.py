"""Makes a recipe run inside a Hugging Face model."""

from saccade.engine.companion import ClipCompanion
from saccade.engine.session import Session, attach

__all__ = ["ClipCompanion", "Session", "attach"]
