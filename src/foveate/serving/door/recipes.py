"""Which recipe a request runs under, on transformers: the server's own, or the same with another keep."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from foveate.checkpoint import Checkpoint
from foveate.core.errors import FoveateError
from foveate.core.items import ItemTokens
from foveate.core.method import Method, Pictures
from foveate.core.recipe import Recipe
from foveate.engine import Session
from foveate.models import anatomy
from foveate.serving.settings import FULL, Keep, Settings


class Recipes:
    """The recipe of a server, attached to its model with the keep that the request at hand asks for.

    Requests run one after the other, on one thread, so there is one session at a time. It is replaced only when a request
    asks for another keep than the one before.
    """

    def __init__(self, checkpoint: Checkpoint, settings: Settings | None) -> None:
        self.settings = settings
        self._checkpoint = checkpoint
        self._own = Recipe() if settings is None else Recipe.of(settings.recipe)
        for method in self._own.methods:
            if isinstance(method, Pictures):
                raise FoveateError(
                    f"{method.name}: acts on pictures before the processor, where the server on transformers has no place "
                    "for it; send smaller pictures"
                )
        self._session: Session | None = None
        self._running: Recipe | None = None
        self.session(None)  # what cannot be attached is no server

    def of(self, keep: Keep | None) -> Recipe:
        """The recipe of a request.

        Raises:
            FoveateError: if the server's recipe has no keep that could be another.
        """
        if keep is None:
            return self._own
        if keep == FULL:
            return Recipe()
        methods = list(self._own.methods)
        places = [place for place, method in enumerate(methods) if _keeps(method)]
        if len(places) != 1:
            raise FoveateError(
                f"foveate.keep={keep!r}: {self._own} has {len(places)} methods that keep so many tokens of each picture; "
                f'only "{FULL}" can be asked of it'
            )
        methods[places[0]] = replace(methods[places[0]], keep=keep)  # type: ignore[call-arg]
        return Recipe(tuple(methods))

    def session(self, keep: Keep | None) -> Session:
        """The model runs under the recipe of a request; on the thread that generates."""
        wanted = self.of(keep)
        if self._session is None or wanted != self._running:
            if self._session is not None:
                self._session.detach()
            self._session, self._running = self._checkpoint.attach(wanted), wanted
        return self._session

    def check(self, keep: Keep | None, inputs: Mapping[str, Any]) -> None:
        """Refuse a keep that is out of bounds for a picture, before anything runs.

        Raises:
            FoveateError: in one line.
        """
        if keep is None or self.settings is None:
            return
        self.of(keep)
        if inputs.get("pixel_values") is None:
            return
        parts = anatomy(self._checkpoint.model)
        signature = inspect.signature(parts.multimodal.get_image_features)  # type: ignore[arg-type]
        bound = signature.bind(**{name: value for name, value in inputs.items() if name in signature.parameters})
        bound.apply_defaults()
        for picture in parts.pictures({**bound.arguments, **bound.arguments.get("kwargs", {})}):
            for view in picture.views:
                self.settings.resolve(keep, view.rows * view.columns)


def _keeps(method: Method) -> bool:
    """Whether its ``keep`` says how many tokens of each picture there are at the end."""
    return isinstance(method, ItemTokens) and "keep" in type(method).__dataclass_fields__
