"""What a recipe and a model cannot do together, refused by name and with the remedy."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any

from foveate.core.errors import FoveateError, NeedsTraining
from foveate.core.exits import Exits
from foveate.core.leaning import Leaning
from foveate.core.method import Cache, Experts, Method, Routing, Tokens
from foveate.core.recipe import Recipe
from foveate.core.reuse import Reuse
from foveate.core.signal import (
    Aligned,
    Features,
    Function,
    Halves,
    Heard,
    Ids,
    Numbers,
    Pixels,
    Question,
    Scorer,
    Seed,
    Side,
    Summary,
)
from foveate.core.traits import Traits
from foveate.core.weights import Weights
from foveate.engine.attention import beyond_logits
from foveate.engine.idle import check_idle
from foveate.engine.presses import check_presses
from foveate.engine.program import Program, layers_of
from foveate.engine.stand_in import compiled
from foveate.engine.thin import check_thin
from foveate.models.anatomy import Anatomy
from foveate.models.decoder import RECURRENT, WINDOWS

KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")

BEFORE_LAYERS = ("patches", "encoder", "pre_projector", "projected", "sequence")
"""Kinds of sites before the first decoder layer, in the order in which a request meets them."""

KINDS = {"full_attention", *WINDOWS, *RECURRENT}
"""Kinds of layers, by what they remember."""


def check(recipe: Recipe, parts: Anatomy, traits: Traits) -> None:
    """Refuse, by name and with the remedy, what ``recipe`` and the model cannot do together."""
    if recipe.methods:
        _check_kernel(parts)
        _check_layers(parts)
    for method in recipe.methods:
        check_idle(method, traits)
        reason = method.check(traits)
        if reason:
            raise FoveateError(f"{method.name}: {reason}")
        _check_depth(method.fitted(traits), traits)
        needed = {layer for signal in method.reads(traits) for layer in layers_of(signal)}
        missing = [layer for layer in traits.recurrent if layer in needed]
        if missing and not isinstance(method, Cache):
            raise FoveateError(
                f"{method.name}: reads the attention of decoder layer {missing[0]}, which has a recurrent state instead; "
                "choose other layers, or a method that acts before the language model"
            )
    owners = [method.name for method in recipe.methods if isinstance(method, Cache)]
    if len(owners) > 1:
        raise FoveateError(f"{owners[0]} + {owners[1]}: each owns the cache; use one of them")
    for method in (m for m in recipe.methods if isinstance(m, Cache) and (m.by_head or type(m).pack is not Cache.pack)):
        attending = (parts.attention(layer) for layer in range(len(parts.layers)) if layer not in traits.recurrent)
        beyond = next(filter(None, map(beyond_logits, attending)), None)
        if beyond:
            raise FoveateError(
                f"{method}: keeps cached entries in a store, where attention with {beyond} cannot be read; use one that "
                "leaves as many entries of every head in the cache, such as snapkv"
            )
    _check_weights(recipe)
    _check_grids(recipe, traits)
    _check_reuse(recipe, traits)
    _check_experts(recipe, traits)
    routed: dict[int, str] = {}
    for method in recipe.methods:
        if not isinstance(method, Routing):
            continue
        for layer in method.routed(traits):
            if layer in routed:
                raise FoveateError(f"{routed[layer]} + {method.name}: both route decoder layer {layer}; use one of them")
            if layer in traits.sliding or layer in traits.recurrent:
                kind = "sliding attention" if layer in traits.sliding else "a recurrent state"
                raise FoveateError(
                    f"{method.name}: decoder layer {layer} has {kind}, which rows cannot leave and come back to; "
                    "choose full-attention layers"
                )
            routed[layer] = method.name
    _check_exits(recipe, traits)
    _check_leaning(recipe, parts, traits, routed)
    for method in recipe.methods:
        _check_parts(method, parts, traits)
    inserting = next((m.name for m in recipe.methods if isinstance(m, Tokens) and m.inserts), None)
    other = next((m.name for m in recipe.methods if minds_inserted(type(m))), None) if inserting else None
    if other:
        raise FoveateError(
            f"{inserting} + {other}: {inserting} puts rows in, which {other} knows nothing of in caches and routes; use one "
            "of them"
        )


def minds_inserted(kind: type[Method]) -> bool:
    """Whether methods of this kind cannot stand beside rows that are put in: they route, or cut earlier caches."""
    return issubclass(kind, Routing | Exits) or (issubclass(kind, Tokens) and kind.cuts_caches)


def _check_kernel(parts: Anatomy) -> None:
    if parts.kernel not in KERNELS:
        raise FoveateError(
            f"attention {parts.kernel!r}: not supported; use model.set_attn_implementation('sdpa'), or load it with "
            "attn_implementation='sdpa'"
        )


def _check_layers(parts: Anatomy) -> None:
    """Every layer has a memory that rows can be taken out of, and attention that can be followed."""
    for layer, kind in enumerate(parts.kinds):
        if kind not in KINDS:
            raise FoveateError(
                f"decoder layer {layer}: {kind!r} is not supported; load a model whose layers are {', '.join(sorted(KINDS))}"
            )
        if layer not in parts.recurrent:
            parts.build(layer)


def _check_depth(method: Method, traits: Traits) -> None:
    """No layer beyond the model's, where a method would silently do nothing."""
    signals = method.reads(traits)
    placeless = Features | Pixels | Summary | Aligned | Question | Ids | Heard | Function | Scorer | Numbers | Seed | Side
    read = [signal.site for signal in signals if not isinstance(signal, placeless)]
    acts = list(method.sites(traits)) if isinstance(method, Tokens) else []
    decoder = [site.layer for site in (*read, *acts) if site.kind == "decoder"]
    decoder += [signal.layer for signal in signals if isinstance(signal, Function | Scorer) and signal.layer is not None]
    decoder += method.routed(traits) if isinstance(method, Routing) else ()
    decoder += method.weighed(traits) if isinstance(method, Experts) else ()
    decoder += method.exits(traits) if isinstance(method, Exits) else ()
    decoder += method.leaned(traits) if isinstance(method, Leaning) else ()
    # Blocks behind the one that feeds the projector may be read, but rows there reach nothing.
    several = max((tower.first + tower.feature_layer + 1 for tower in traits.towers), default=0)
    within = {
        "decoder layer": (decoder, traits.decoder_layers),
        "encoder block": ([site.layer for site in read if site.kind == "encoder"], traits.encoder_layers or several),
        "encoder block as a site": (
            [site.layer for site in acts if site.kind == "encoder"],
            several if traits.feature_layer is None else traits.feature_layer + 1,
        ),
        "encoder block in part": (
            list(method.reused(traits)) if isinstance(method, Reuse) else [],
            traits.encoder_layers if traits.reuses and traits.encoder_layers else 0,
        ),
    }
    for what, (layers, depth) in within.items():
        beyond = [layer for layer in layers if not 0 <= layer < depth]
        if beyond:
            there = f"must be in 0..{depth - 1}" if depth else f"{traits.family} offers none; use another method"
            raise FoveateError(f"{method.name}: {what} {beyond[0]}: {there}")


def _check_parts(method: Method, parts: Anatomy, traits: Traits) -> None:
    """The parts of layers that a method asks for are there."""
    try:
        for signal in method.reads(traits):
            if isinstance(signal, Halves):
                parts.halves(signal.site.layer)
            elif isinstance(signal, Function) and signal.name in ("rotate", "unrotate"):
                parts.turned(signal.layer or 0)
            elif isinstance(signal, Function) and signal.rank is not None:
                check_thin(parts)
        check_presses([signal for signal in method.reads(traits) if isinstance(signal, Scorer)], parts)
    except FoveateError as error:
        raise FoveateError(f"{method.name}: {error}") from error


@cache
def warn_untrained(kind: type[Method]) -> None:
    """Say, once in a process, that a method's results depend on training that a model does not show."""
    warnings.warn(
        f"{kind.name}: needs training: {kind.trained}; if this model was trained with it, ignore this "
        "(warnings.simplefilter('ignore', foveate.NeedsTraining))",
        NeedsTraining,
        stacklevel=3,
    )


def check_training(program: Program) -> None:
    """Refuse to train in a way that runs layers twice."""
    module = program.anatomy.model
    if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
        raise FoveateError(
            f"gradient checkpointing: not possible under {program.recipe}, as layers that are run again have no cache and "
            "show no attention; turn it off"
        )


def check_call(program: Program, kwargs: Mapping[str, Any], cache_unwanted: bool) -> None:
    """Refuse what a call of the language model with ``kwargs`` asks for, where the recipe cannot give it."""
    anatomy = program.anatomy
    if not program.methods:
        return
    _check_kernel(anatomy)  # which may have been changed since
    if anatomy.mask_free != program.traits.mask_free:
        raise FoveateError(
            f"attention {anatomy.kernel!r}: takes other masks than the one under which {program.recipe} was attached; "
            "attach again"
        )
    if cache_unwanted and program.cache is not None:
        raise FoveateError(
            f"use_cache=False: {program.cache.name} compresses a cache that would not be kept; use use_cache=True, or a "
            "recipe without it"
        )
    if kwargs.get("output_attentions") or getattr(anatomy.config, "output_attentions", False):
        raise FoveateError(
            f"output_attentions=True: not possible under {program.recipe}, as layers attend to different numbers of rows; "
            "attach without a recipe ('none') to read attention maps"
        )
    late = [number for number, layer in enumerate(anatomy.layers) if compiled(layer) and number not in program.compiled]
    if late:
        raise FoveateError(
            f"torch.compile: decoder layer {late[0]} was compiled while {program.recipe} is attached; compile it before"
        )


def _check_weights(recipe: Recipe) -> None:
    """The linears of a part are replaced once."""
    parts: dict[str, str] = {}
    for method in (m for m in recipe.methods if isinstance(m, Weights) and not m.plain):
        if method.part in parts:
            raise FoveateError(
                f"{parts[method.part]} + {method.name}: both replace weights of the {method.part}; use one of them"
            )
        parts[method.part] = method.name


def _check_grids(recipe: Recipe, traits: Traits) -> None:
    """Some choosers need whole grids: nothing may be dropped or merged before them."""
    acting = []
    for number, method in enumerate(m for m in recipe.methods if isinstance(m, Tokens)):
        places = [BEFORE_LAYERS.index(site.kind) for site in method.sites(traits) if site.kind in BEFORE_LAYERS]
        acting += [(min(places), number, method)] if places else []
    acting.sort(key=lambda found: found[:2])
    for rank, (place, _, method) in enumerate(acting):
        if method.needs_grid and rank:
            first, _, before = acting[0]
            remedy = "put it first, or use one of them" if first == place else "use one of them"
            raise FoveateError(
                f"{before.name} + {method.name}: {method.name} needs whole grids, and {before.name} drops tokens "
                f"before it; {remedy}"
            )


def _check_reuse(recipe: Recipe, traits: Traits) -> None:
    """Frames are whole where they take from each other."""
    reusing = [m for m in recipe.methods if isinstance(m, Reuse) and m.reused(traits)]
    if len(reusing) > 1:
        raise FoveateError(f"{reusing[0].name} + {reusing[1].name}: both let encoder blocks run in part; use one of them")
    for method in recipe.methods if reusing else ():
        acts = method.sites(traits) if isinstance(method, Tokens) else ()
        inside = next((site for site in acts if site.kind in ("patches", "encoder")), None)
        if inside:
            raise FoveateError(
                f"{reusing[0].name} + {method.name}: {method.name} drops rows at {inside}, where {reusing[0].name} needs "
                "them all; use one of them"
            )


def _check_experts(recipe: Recipe, traits: Traits) -> None:
    for method in (m for m in recipe.methods if isinstance(m, Experts)):
        if not traits.sparse:
            raise FoveateError(
                f"{method.name}: {traits.family} has no experts; load a mixture-of-experts model such as qwen3_vl_moe"
            )
        dense = sorted(set(method.weighed(traits)) - set(traits.sparse))
        if dense:
            there = ", ".join(map(str, traits.sparse))
            raise FoveateError(f"{method.name}: decoder layer {dense[0]} has no experts; layers with experts: {there}")


def _check_exits(recipe: Recipe, traits: Traits) -> None:
    """Behind its first exit nobody but the one who lets rows leave says anything of them."""
    exiting = [(m, layers) for m in recipe.methods if isinstance(m, Exits) and (layers := m.fitted(traits).exits(traits))]
    if len(exiting) > 1:
        raise FoveateError(f"{exiting[0][0].name} + {exiting[1][0].name}: both let rows leave early; use one of them")
    for method, layers in exiting:
        first, name = min(layers), method.name
        if first < 1:
            raise FoveateError(f"{name}: layer {first}: must be 1 or more, as a layer has to run before anything leaves")
        other = next((n for n in range(first, traits.decoder_layers) if n in (*traits.sliding, *traits.recurrent)), None)
        if other is not None:
            kind = "sliding attention" if other in traits.sliding else "a recurrent state"
            raise FoveateError(
                f"{name}: decoder layer {other}, behind the first exit, has {kind}, which rows cannot leave; use a model "
                "whose later layers have full attention"
            )
        for beside in (m for m in recipe.methods if m is not method):
            late = "owns the cache" if isinstance(beside, Cache) else _acts_behind(beside.fitted(traits), first, traits)
            if late:
                raise FoveateError(
                    f"{name} + {beside.name}: {beside.name} {late}, and from layer {first} on rows may have left; "
                    f"use one of them, or other layers"
                )


def _check_leaning(recipe: Recipe, parts: Anatomy, traits: Traits, routed: Mapping[int, str]) -> None:
    """Attention to which something is added is there, is all that its layer does, and is of all rows."""
    for method in (m for m in recipe.methods if isinstance(m, Leaning)):
        for layer in method.fitted(traits).leaned(traits):
            if layer in traits.recurrent:
                raise FoveateError(
                    f"{method.name}: decoder layer {layer} has a recurrent state, and no attention to add to; choose others"
                )
            beyond = beyond_logits(parts.attention(layer))
            if beyond:
                raise FoveateError(
                    f"{method.name}: decoder layer {layer} has attention with {beyond}, to which nothing can be added; use "
                    "another model or method"
                )
            if layer in routed:
                raise FoveateError(
                    f"{routed[layer]} + {method.name}: {method.name} adds to the attention of decoder layer {layer}, which "
                    f"{routed[layer]} routes; use one of them, or other layers"
                )


def _acts_behind(method: Method, first: int, traits: Traits) -> str | None:
    """What a method does behind the exit before decoder layer ``first``; None if nothing."""
    acts = [site.layer for site in method.sites(traits) if site.kind == "decoder"] if isinstance(method, Tokens) else []
    routed = list(method.routed(traits)) if isinstance(method, Routing) else []
    leaned = list(method.leaned(traits)) if isinstance(method, Leaning) else []
    acts = [layer for layer in acts if layer > first]
    for what, layers in (("acts before", acts), ("routes", routed), ("adds to the attention of", leaned)):
        late = [layer for layer in layers if layer >= first]
        if late:
            return f"{what} decoder layer {min(late)}"
    return None
