"""What a method must equal: the whole conversation, with the dropped rows masked as keys, layer by layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from saccade.core.layout import VISUAL, Layout
from saccade.core.recipe import Recipe
from saccade.core.report import Trace
from saccade.engine.run import Program
from saccade.models import anatomy
from tests import tiny


def masked_logits(
    model: Any, inputs: dict[str, Tensor], trace: Trace, recipe: Recipe, starts: tuple[int, ...], prompt: int
) -> Tensor:
    """Logits ``[B, L, V]`` of the plain model over the full sequence.

    Args:
        model: the model, no session attached.
        inputs: the whole conversation.
        trace: of the session that this is the oracle for.
        recipe: what ran.
        starts: where each turn that brought images began.
        prompt: length of the first prompt; evicted cache entries are masked for later queries.
    """
    parts = anatomy(model)
    ids = inputs["input_ids"]
    batch, length = ids.shape
    routed = Program(recipe.methods, parts).routing
    groups = parts.config.num_attention_heads // parts.config.num_key_value_heads
    dropped = [_dropped(ids, trace, starts, layer) for layer in range(len(parts.layers))]

    def before(layer: int) -> Any:
        closed = dropped[layer][:, None, None]
        if trace.kept and trace.kept[layer] is not None:
            evicted = _evicted(trace, layer, batch, length, prompt).repeat_interleave(groups, dim=1)
            closed = closed | (evicted[:, :, None] & (torch.arange(length)[:, None] >= prompt))

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
            float_mask = mask.is_floating_point()
            mask = mask.masked_fill(closed, torch.finfo(mask.dtype).min) if float_mask else mask & ~closed
            return args, dict(kwargs, attention_mask=mask)

        return hook

    def after(layer: int) -> Any:
        frozen = torch.zeros(batch, length, dtype=torch.bool)
        for layouts, start in zip(trace.log, starts):
            frozen |= _places(layouts[layer], layouts[layer].rows(*VISUAL), length, start)

        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            return torch.where(frozen[..., None], args[0], output)

        return hook

    handles = [module.register_forward_pre_hook(before(i), with_kwargs=True) for i, module in enumerate(parts.layers)]
    handles += [parts.layers[i].register_forward_hook(after(i), with_kwargs=True) for i in routed]
    if parts.rotary_rows == 1:
        inputs = dict(inputs, position_ids=_positions(inputs["attention_mask"], dropped[0], recipe))
    try:
        with torch.no_grad():
            return model(**inputs, use_cache=False).logits
    finally:
        for handle in handles:
            handle.remove()


def _places(layout: Layout, chosen: Tensor, length: int, start: int) -> Tensor:
    """``[B, L]``: where the ``chosen`` rows of a layout stand in the conversation."""
    out = torch.zeros(layout.shape[0], length + 1, dtype=torch.bool)
    return out.scatter(1, torch.where(chosen, layout.origin + start, length), True)[:, :length]


def _dropped(ids: Tensor, trace: Trace, starts: tuple[int, ...], layer: int) -> Tensor:
    alive = torch.zeros_like(ids, dtype=torch.bool)
    for layouts, start in zip(trace.log, starts):
        alive |= _places(layouts[layer], layouts[layer].valid, ids.shape[1], start)
    return (ids == tiny.IMAGE) & ~alive


def _evicted(trace: Trace, layer: int, batch: int, length: int, prompt: int) -> Tensor:
    """``[B, Hkv, L]``: prompt tokens that a layer's cache no longer holds."""
    layouts = trace.log[0]
    kept = trace.kept[layer]
    tokens = layouts[layer].origin[:, None].expand(-1, kept.shape[1], -1).gather(2, kept.clamp(min=0))
    there = torch.zeros(batch, kept.shape[1], length + 1, dtype=torch.bool)
    there = there.scatter(2, torch.where((kept >= 0) & (tokens >= 0), tokens, length), True)[..., :length]
    return ~there & (torch.arange(length) < prompt)


def _positions(mask: Tensor, dropped: Tensor, recipe: Recipe) -> Tensor:
    """Rotary positions ``[B, L]``: renumbered without the dropped rows where the recipe does so."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    contiguous = any(getattr(method, "positions", None) in ("auto", "contiguous") for method in recipe.methods)
    return (positions - dropped.cumsum(1)).clamp(min=0) if contiguous else positions
