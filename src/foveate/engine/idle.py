"""What has nothing to do in a model, refused by name."""

from __future__ import annotations

from foveate.core.errors import FoveateError
from foveate.core.method import Cache, Method
from foveate.core.traits import Traits


def check_idle(method: Method, traits: Traits) -> None:
    """Refuse a method that would leave every prompt of the model as it is, for want of pictures or of a cache that grows.

    Raises:
        FoveateError: with the remedy.
    """
    if not traits.sees and not method.textual:
        raise FoveateError(
            f"{method.name}: acts on the tokens of pictures, and this is a model of text alone; use a method of the cache "
            "or of the weights, such as snapkv or rtn"
        )
    bounded = {*traits.sliding, *traits.recurrent}
    if isinstance(method, Cache) and bounded.issuperset(range(traits.decoder_layers)):
        raise FoveateError(
            f"{method.name}: every layer of this model sees a window of the last tokens, or keeps a state of fixed size, so "
            "that no cache grows with the prompt; use a method of the weights, such as rtn"
        )
    if not traits.sees and getattr(method.fitted(traits), "tokens", None) == "visual":
        raise FoveateError(f"{method.name}: tokens='visual': this is a model of text alone; use tokens='all'")
