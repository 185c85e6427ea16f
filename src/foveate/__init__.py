"""Foveate: published efficiency methods for vision-language models, on the model you already have.

>>> import foveate
>>> with foveate.attach(model, "hiprune(keep=64)") as session:  # doctest: +SKIP
...     out = model.generate(**inputs)
>>> print(session.report)  # doctest: +SKIP
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

if TYPE_CHECKING:
    from foveate.engine import ClipCompanion, Session, attach

__version__ = version("foveate")
__all__ = ["Artifact", "ClipCompanion", "FoveateError", "Recipe", "Session", "attach"]


def __getattr__(name: str) -> Any:
    """The engine brings transformers, which takes seconds to import; so it comes when it is first asked for."""
    if name in ("ClipCompanion", "Session", "attach"):
        from foveate import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
