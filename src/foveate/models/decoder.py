"""A decoder layer taken apart by watching it run once, on a few random rows.

Text models put their layers together from other parts, under other names and in another order: norms before or behind,
projections in one piece, a rotation of half a head or of none, blocks side by side. What is said here of a layer is what it
did; what it did not do, it is not asked for.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foveate.core.errors import FoveateError
from foveate.models.taps import STUB, tapped

ROWS = 3
"""Rows that a layer is watched on."""

WINDOWS = frozenset({"sliding_attention", "chunked_attention"})
"""Kinds of layers that see the last tokens only."""

RECURRENT = frozenset({"linear_attention", "conv", "mamba", "recurrent"})
"""Kinds of layers with a state of fixed size instead of a cache."""

Tables = tuple[Tensor, Tensor]
"""Rotary cosines and sines."""


@dataclass(frozen=True)
class Entered:
    """What one call of an attention module handed to its attention function, and to its cache.

    Attributes:
        query: ``[B, H, n, d]``.
        key: ``[B, H or Hkv, n, d]``.
        mask: as the function got it.
        scale: of the logits.
        cached: keys and values ``[B, Hkv, n, d]`` as they are remembered, which some families blow up before attention.
    """

    query: Tensor
    key: Tensor
    mask: Any
    scale: float
    cached: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Build:
    """How a decoder layer is put together; layers that are built alike share one.

    Attributes:
        norm: the part whose output its attention reads; None where that is what enters the layer.
        halves: the parts whose outputs are what enters and leaves its attention, and what enters and leaves its MLP (norms
            included); None where the layer is not its input, plus its attention's output, plus its MLP's.
        projected: whether ``q_proj``, ``k_proj``, ``v_proj``, norms behind them and the rotation make all that enters
            attention; if not, the attention module has to be asked.
        turned: numbers at the front of each head that the family's rotation is given, 0 where nothing turns; None where what
            it does is no such rotation.
        scale: of the logits.
    """

    norm: str | None
    halves: tuple[str, str, str, str] | None
    projected: bool
    turned: int | None
    scale: float


def layers_of(language_model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a text model.

    Raises:
        FoveateError: if they are no layers with attention and rotary positions, as transformers builds them.
    """
    layers: Any = getattr(language_model, "layers", None)
    called = inspect.signature(layers[0].forward).parameters if isinstance(layers, nn.ModuleList) else {}
    if not hasattr(language_model, "rotary_emb") or "position_embeddings" not in called:
        raise FoveateError(
            f"text model {type(language_model).__name__}: its layers are not given rotary positions from outside, as those "
            "of llama or qwen2 are; load a model with such a decoder"
        )
    if not any(attention_of(layer) for layer in layers):
        raise FoveateError(f"text model {type(language_model).__name__}: no layer has attention that can be read")
    return layers  # type: ignore[no-any-return]


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The attention module of a decoder layer, whatever it is called; None where there is none."""
    return next((part for part in layer.children() if hasattr(part, "scaling") and hasattr(part, "layer_idx")), None)


def kinds_of(config: Any, layers: int) -> tuple[str, ...]:
    """What kind of memory each layer has, in transformers' words: ``full_attention``, ``sliding_attention`` and so on."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:  # all are of one kind (Mistral)
        sliding = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
        kinds = ["sliding_attention" if sliding else "full_attention"] * layers
    return tuple(kinds)


def alike(layer: nn.Module, kind: str) -> tuple[Any, ...]:
    """What layers of the same build have in common: their parts, and the numbers and switches of each."""
    return kind, tuple((name, type(part), _switches(part)) for name, part in layer.named_modules())


def _switches(part: nn.Module) -> tuple[tuple[str, Any], ...]:
    plain = (bool, int, float, str, type(None))
    found = ((key, value) for key, value in vars(part).items() if isinstance(value, plain) and not key.startswith("_"))
    return tuple((key, value) for key, value in found if key not in ("layer_idx", "training"))


def watch(layer: nn.Module, attention: nn.Module, x: Tensor, tables: Callable[[], Tables]) -> Build | str:
    """How ``layer`` is built, seen as it works on rows ``x`` ``[1, n, D]``; or why methods cannot work with it."""
    try:
        with torch.no_grad(), _at_rest(layer):
            return _watch(layer, attention, x, tables())
    # A layer may want anything of its caller, or its rotary module give anything; what it says is the reason.
    except Exception as error:
        return f"{type(layer).__name__} cannot be taken apart ({_first_line(error)})"


def _watch(layer: nn.Module, attention: nn.Module, x: Tensor, tables: Tables) -> Build:
    calls: list[tuple[str, Tensor, Tensor]] = []

    def noting(name: str) -> Callable[..., None]:
        def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = args[0] if args else kwargs.get("hidden_states")
            if isinstance(given, Tensor):
                calls.append((name, given, output[0] if isinstance(output, tuple) else output))

        return note

    parts = dict(layer.named_children())
    handles = [part.register_forward_hook(noting(name), with_kwargs=True) for name, part in parts.items()]
    try:
        with listening(attention) as heard:
            out = layer(x, position_embeddings=tables, attention_mask=None, **remembering(layer, heard.cache))
    finally:
        for handle in handles:
            handle.remove()
    own = next(name for name, part in parts.items() if part is attention)
    read = next((given for name, given, _ in calls if name == own), None)
    if not isinstance(out, Tensor) or read is None or len(heard.calls) != 1 or heard.calls[0].mask is not None:
        raise FoveateError("it does not call transformers' attention functions once and with the mask that it is given")
    before = [name for name, given, made in calls if _same(made, read) and _same(given, x)]
    if not before and not _same(read, x):
        raise FoveateError("what its attention reads is made by none of its parts")
    norm = before[0] if before else None
    entered, plain = heard.calls[0], ask(attention, read, (torch.ones_like(tables[0]), torch.zeros_like(tables[1])))
    turned = _turned(attention, plain, entered, tables)
    return Build(
        norm=norm,
        halves=_halves(calls, own, norm, x, out),
        projected=turned is not None and _projected(attention, read, entered, tables, turned),
        turned=turned,
        scale=entered.scale,
    )


def ask(attention: nn.Module, x: Tensor, tables: Tables) -> Entered:
    """What an attention module makes of its input rows ``x`` ``[B, n, D]``; the attention itself is left out."""
    with listening(attention) as heard:
        attention(hidden_states=x, position_embeddings=tables, attention_mask=None, **remembering(attention, heard.cache))
    return heard.calls[0]


def project(attention: Any, name: str, x: Tensor) -> Tensor:
    """``[B, H, n, d]`` queries (``q``), keys (``k``) or values (``v``) that the projection of that name makes of ``x``."""
    made = getattr(attention, f"{name}_proj")(x)
    heads = attention.config.num_attention_heads if name == "q" else made.shape[-1] // attention.head_dim
    # A family may make a gate behind each head's query, with the same projection.
    made = made.unflatten(-1, (heads, -1))[..., : attention.head_dim]
    if hasattr(attention, f"{name}_norm"):
        made = getattr(attention, f"{name}_norm")(made)
    return made.transpose(1, 2)  # type: ignore[no-any-return]


def turn(attention: nn.Module, query: Tensor, key: Tensor, tables: Tables, width: int) -> tuple[Tensor, Tensor]:
    """Both, the first ``width`` numbers of each head turned as the family does it."""
    if not width:
        return query, key
    family = vars(sys.modules[type(attention).__module__])
    tables = tables[0].to(key.device), tables[1].to(key.device)
    if tables[0].ndim == 4:  # tables of all axes: older transformers pick the axes' sections as they rotate
        sections = attention.config.rope_parameters["mrope_section"]  # type: ignore[union-attr, index]
        return family["apply_multimodal_rotary_pos_emb"](query, key, *tables, sections)  # type: ignore[no-any-return]
    turned = family["apply_rotary_pos_emb"](query[..., :width], key[..., :width], *tables)
    if width == key.shape[-1]:
        return turned  # type: ignore[no-any-return]
    return tuple(torch.cat([t, rest[..., width:]], dim=-1) for t, rest in zip(turned, (query, key)))  # type: ignore[return-value]


@dataclass
class Heard:
    """What one attention module called its attention function with, over a cache that was empty."""

    cache: DynamicCache = field(default_factory=DynamicCache)
    calls: list[Entered] = field(default_factory=list)


@contextmanager
def listening(attention: nn.Module) -> Iterator[Heard]:
    """What enters the attention function when ``attention`` calls it; meanwhile each value passes for the output."""
    heard = Heard()

    def hear(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        scale = kwargs.get("scaling")
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        stored: Any = next((layer for layer in heard.cache.layers if layer.is_initialized), None)
        if stored is None:
            raise FoveateError("it does not write into the cache that it is given")
        heard.calls.append(Entered(query, key, attention_mask, scale, (stored.keys, stored.values)))
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None

    attention.__dict__[STUB] = hear
    try:
        with tapped([attention]):
            yield heard
    finally:
        attention.__dict__.pop(STUB)


def remembering(module: nn.Module, cache: DynamicCache) -> dict[str, DynamicCache]:
    """The argument that has a layer, or its attention, write into ``cache``."""
    known = inspect.signature(module.forward).parameters
    return {"past_key_values" if "past_key_values" in known else "layer_past": cache}


@contextmanager
def _at_rest(layer: nn.Module) -> Iterator[None]:
    """Without dropout."""
    modes = {part: part.training for part in layer.modules()}
    layer.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


def _turned(attention: nn.Module, plain: Entered, entered: Entered, tables: Tables) -> int | None:
    """See `Build.turned`: found by turning what is made without a rotation."""
    whole = plain.key.shape[-1]
    for width in dict.fromkeys((0, whole, min(tables[0].shape[-1], whole))):
        try:
            query, key = turn(attention, plain.query, plain.key, tables, width)
        except (KeyError, RuntimeError):  # it has no such function, or one for another width
            continue
        if _same(query, entered.query) and _same(key, entered.key):
            return width
    return None


def _projected(attention: nn.Module, read: Tensor, entered: Entered, tables: Tables, width: int) -> bool:
    """See `Build.projected`."""
    try:
        query, key, value = (project(attention, name, read) for name in ("q", "k", "v"))
    except (AttributeError, RuntimeError):  # other parts, or the same names for parts of another shape
        return False
    return all(map(_same, (*turn(attention, query, key, tables, width), value), (entered.query, *entered.cached)))


def _halves(
    calls: list[tuple[str, Tensor, Tensor]], own: str, norm: str | None, x: Tensor, out: Tensor
) -> tuple[str, str, str, str] | None:
    """See `Build.halves`: followed from part to part."""
    if norm is None:
        return None
    attended, left = _follow(calls, own)
    middle = x + left
    second = [name for name, given, _ in calls if _same(given, middle)]
    if not second:
        return None  # side by side, or the MLP reads its rows without a norm
    made = next(made for name, _, made in calls if name == second[0])
    mlp = [name for name, given, _ in calls if name != second[0] and _same(given, made)]
    if not mlp:
        return None
    changed, right = _follow(calls, mlp[0])
    return (norm, attended, second[0], changed) if _same(middle + right, out) else None


def _follow(calls: list[tuple[str, Tensor, Tensor]], name: str) -> tuple[str, Tensor]:
    """The last part through which a part's output goes before it is added, and what comes out there."""
    made = next(made for other, _, made in calls if other == name)
    for other, given, behind in calls:
        if other != name and _same(given, made):
            name, made = other, behind
    return name, made


def _same(one: Tensor, other: Tensor) -> bool:
    """But for rounding."""
    if one.shape != other.shape:
        return False
    off = (one.float() - other.to(one.device).float()).norm()
    return bool(off <= 2 * torch.finfo(one.dtype).eps * other.float().norm())


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
