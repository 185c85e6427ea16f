"""Saccade: published efficiency methods for vision-language models, on the model you already have.

>>> import saccade
>>> with saccade.attach(model, "hiprune(keep=64)") as session:  # doctest: +SKIP
...     out = model.generate(**inputs)
>>> print(session.report)  # doctest: +SKIP
"""

from importlib.metadata import version

from saccade.core.errors import SaccadeError
from saccade.core.recipe import Recipe
from saccade.engine import Session, attach

__version__ = version("saccade")
__all__ = ["Recipe", "SaccadeError", "Session", "attach"]
