"""What has nothing to do in a text model, refused by name."""

from __future__ import annotations

from foveate.core.errors import FoveateError
from foveate.core.method import Method
from foveate.core.traits import Traits


def check_textual(method: Method, traits: Traits) -> None:
    """Refuse a method that would leave every prompt of the model as it is, for want of pictures.

    Raises:
        FoveateError: with the remedy.
    """
    if traits.sees:
        return
    if not method.textual:
        raise FoveateError(
            f"{method.name}: acts on the tokens of pictures, and this is a model of text alone; use a method of the cache "
            "or of the weights, such as snapkv or rtn"
        )
    if getattr(method.fitted(traits), "tokens", None) == "visual":
        raise FoveateError(f"{method.name}: tokens='visual': this is a model of text alone; use tokens='all'")
