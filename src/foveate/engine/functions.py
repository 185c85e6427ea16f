"""Parts of the model as functions, for methods that call them on rows of their own choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.signal import Function, on
from foveate.engine.sides import Present, saying
from foveate.engine.thin import thin
from foveate.models.anatomy import Anatomy


def function(anatomy: Anatomy, signal: Function) -> Callable[..., Any]:
    """What `foveate.core.signal.Function` promises, on this model."""
    layer = signal.layer

    def query_key(x: Tensor, layout: Layout, rope: bool = True) -> tuple[Tensor, Tensor]:
        assert layer is not None
        with saying(Present(layout.role)):
            query, key = anatomy.query_key(layer, x, anatomy.rotary(layer, x, layout.positions) if rope else None)
        # As if every family divided its logits by the root of the head's width.
        factor = anatomy.build(layer).scale * query.shape[-1] ** 0.5
        return (query if abs(factor - 1) < 1e-6 else query * factor), key

    def rotate(x: Tensor, positions: Tensor) -> Tensor:
        # The model turns queries and keys at once; one head stands in for queries.
        return anatomy.rotate(layer or 0, x[:, :1], x, anatomy.rotary(layer or 0, x, positions))[1]

    def unrotate(x: Tensor, positions: Tensor) -> Tensor:
        cos, sin = anatomy.rotary(layer or 0, x, positions)
        length = cos.square() + sin.square()  # not 1 where the family scales its tables
        return anatomy.rotate(layer or 0, x[:, :1], x, (cos / length, -sin / length))[1]

    model: Any = anatomy.model
    made: dict[str, Callable[..., Any]] = {
        "query_key": query_key,
        "rotate": rotate,
        "unrotate": unrotate,
        "norm": lambda x: anatomy.norm(layer)(x),
        "head": lambda x: model.get_output_embeddings()(x),
        "embedding": lambda ids: model.get_input_embeddings()(ids),
    }
    if signal.name == "projector" and anatomy.encoder is not None:
        encoder = anatomy.encoder if signal.rank is None else thin(anatomy.encoder, signal.rank)
        made["projector"] = encoder.project
    called = made[signal.name]
    # Where accelerate runs a part elsewhere, what it makes comes back to the rows.
    return lambda x, *args, **kwargs: on(called(x, *args, **kwargs), x.device)
