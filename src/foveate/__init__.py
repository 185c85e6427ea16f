"""Foveate: published efficiency methods for vision-language models, on the model you already have.

>>> import foveate
>>> with foveate.attach(model, "hiprune(keep=64)") as session:  # doctest: +SKIP
...     out = model.generate(**inputs)
>>> print(session.report)  # doctest: +SKIP
"""

import logging
import sys
from importlib import import_module
from typing import TYPE_CHECKING

# What Foveate has to say goes where the program that uses it sends its log, and nowhere otherwise.
logging.getLogger(__name__).addHandler(logging.NullHandler())

__all__ = [
    "Artifact",
    "ClipCompanion",
    "FoveateError",
    "NeedsTraining",
    "Recipe",
    "Session",
    "__version__",
    "attach",
    "methods",
    "models",
    "quantize",
    "reference",
    "stream",
    "tasks",
]

if TYPE_CHECKING:
    from foveate import methods, models, reference, tasks
    from foveate.core.artifact import Artifact
    from foveate.core.errors import FoveateError, NeedsTraining
    from foveate.core.recipe import Recipe
    from foveate.engine import ClipCompanion, Session, attach
    from foveate.engine.quantize import quantize
    from foveate.streams import stream

    __version__: str
else:
    # torch and transformers take seconds to import, so all comes when it is first asked for. Type checkers see the names
    # above and not this function, which would make any name right.
    _HOMES = {
        "Artifact": "foveate.core.artifact",
        "ClipCompanion": "foveate.engine",
        "FoveateError": "foveate.core.errors",
        "NeedsTraining": "foveate.core.errors",
        "Recipe": "foveate.core.recipe",
        "Session": "foveate.engine",
        "attach": "foveate.engine",
        "quantize": "foveate.engine.quantize",
        "stream": "foveate.streams",
    }

    def __getattr__(name: str) -> object:
        if name == "__version__":
            return import_module("importlib.metadata").version("foveate")
        if name in _HOMES:
            return getattr(import_module(_HOMES[name]), name)
        if name in __all__:
            return import_module(f"foveate.{name}")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=sys.modules[__name__])


def __dir__() -> list[str]:
    return __all__
