"""Saccade: published efficiency methods for vision-language models, on the model you already have.

>>> import saccade
>>> with saccade.attach(model, "hiprune(keep=64)") as session:  # doctest: +SKIP
...     out = model.generate(**inputs)
>>> print(session.report)  # doctest: +SKIP
"""

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from saccade.core.errors import SaccadeError
from saccade.core.recipe import Recipe

if TYPE_CHECKING:
    from saccade.engine import ClipCompanion, Session, attach

__version__ = version("saccade")
__all__ = ["ClipCompanion", "Recipe", "SaccadeError", "Session", "attach"]


def __getattr__(name: str) -> Any:
    """The engine brings transformers, which takes seconds to import; so it comes when it is first asked for."""
    if name in ("ClipCompanion", "Session", "attach"):
        from saccade import engine

        return getattr(engine, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
