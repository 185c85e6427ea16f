"""``attach``: a recipe, running inside a model until it is detached."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from saccade.core.errors import SaccadeError
from saccade.core.layout import Layout
from saccade.core.method import Cache, ItemTokens, Method, Routing
from saccade.core.recipe import Recipe
from saccade.core.report import Report, Trace
from saccade.core.signal import Attention, Columns, Features, Signal
from saccade.core.state import State
from saccade.engine import probe
from saccade.engine.cache import adopt
from saccade.engine.clock import Clock
from saccade.engine.flops import prefill_flops
from saccade.engine.intake import Intake
from saccade.engine.run import Program, Run
from saccade.models.anatomy import Anatomy, Grid, anatomy

_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()
KERNELS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def attach(model: nn.Module, recipe: Recipe | Method | str, *, seed: int = 0) -> Session:
    """Run ``recipe`` inside ``model`` until the session is detached (or its ``with`` block ends).

    Args:
        model: a vision-language model loaded through transformers (LLaVA-1.5, Gemma 3, Qwen3-VL).
        recipe: a `Recipe`, a method, or text such as ``"hiprune(keep=64) + snapkv(keep=0.5)"``; ``"none"`` only measures.
        seed: seed of methods that draw.

    Raises:
        SaccadeError: if the model is not supported, has a session already, or cannot host the recipe. Nothing is left
            half-attached.
    """
    parts = anatomy(model)
    recipe = Recipe.of(recipe)
    if model in _SESSIONS:
        raise SaccadeError(f"model: already runs under {_SESSIONS[model].recipe}; detach that session first")
    check(recipe, parts)
    return Session(parts, recipe, seed)


def check(recipe: Recipe, parts: Anatomy) -> None:
    """Refuse, by name and with the remedy, what ``recipe`` and the model cannot do together."""
    traits = parts.traits()
    if recipe.methods and parts.kernel not in KERNELS:
        raise SaccadeError(f"attention {parts.kernel!r}: not supported; load the model with attn_implementation='sdpa'")
    for method in recipe.methods:
        reason = method.check(traits)
        if reason:
            raise SaccadeError(f"{method.name}: {reason}")
    for kind, what in ((ItemTokens, "chooses among each image's tokens"), (Cache, "owns the cache")):
        several = [m.name for m in recipe.methods if isinstance(m, kind)]
        if len(several) > 1:
            raise SaccadeError(f"{several[0]} + {several[1]}: each {what}; use one of them")
    routed: dict[int, str] = {}
    for method in recipe.methods:
        if not isinstance(method, Routing):
            continue
        for layer in method.routed(traits):
            if layer in routed:
                raise SaccadeError(f"{routed[layer]} + {method.name}: both route decoder layer {layer}; use one of them")
            if _is_sliding(parts, layer):
                raise SaccadeError(
                    f"{method.name}: decoder layer {layer} has sliding attention, whose cache cannot hold "
                    "frozen rows; choose full-attention layers"
                )
            routed[layer] = method.name


class Session:
    """A recipe at work in a model. Made by `attach`.

    Attributes:
        recipe: what runs.
        trace: which visual tokens are alive where, for the last request.
        attached: whether it is still at work.
    """

    def __init__(self, parts: Anatomy, recipe: Recipe, seed: int) -> None:
        self.recipe = recipe
        self.anatomy = parts
        self.trace = Trace()
        self.attached = True
        self._program = Program(recipe.methods, parts)
        self._clock = Clock(next(parts.model.parameters()).device)
        self._state = State()
        self._state.put("session", "seed", seed)
        self._incoming: Mapping[str, Any] | None = None
        self._grids: list[Grid] = []
        self._encoded: dict[Signal, Any] = {}
        self._run: Run | None = None
        self._prefill: list[Layout] = []
        self._kv_bytes: tuple[int, ...] = ()
        self._drop_cache = False
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self.detach()
            raise
        _SESSIONS[parts.model] = self

    def __enter__(self) -> Session:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.detach()

    def detach(self) -> None:
        """Give the model back as it was. Detaching twice is fine."""
        self.attached = False
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._run = self._incoming = None
        self._encoded.clear()
        _SESSIONS.pop(self.anatomy.model, None)

    @property
    def report(self) -> Report:
        """What the last request cost."""
        config, layouts, clock = self.anatomy.config, self._prefill, self._clock
        entering = layouts[:-1]
        samples = max((len(layout.live) for layout in entering), default=0)

        def mean(counts: tuple[int, ...]) -> float:
            return sum(counts) / len(counts)

        full = [item.count for items in entering[0].items for item in items] if entering else []
        before = [
            tuple(n - v + sum(item.count for item in items) for n, v, items in zip(lay.live, lay.visual, lay.items))
            for lay in entering
        ]
        active = [
            tuple(n - v for n, v in zip(lay.live, lay.visual)) if layer in self._program.routing else lay.live
            for layer, lay in enumerate(entering)
        ]
        live = [layout.live for layout in entering]
        return Report(
            recipe=str(self.recipe),
            samples=samples,
            original_visual_tokens=sum(full) / samples if samples else 0.0,
            visual_tokens=tuple(mean(layout.visual) for layout in entering),
            rows=tuple(map(mean, live)),
            active=tuple(map(mean, active)),
            kv_bytes=self._kv_bytes,
            encode_seconds=clock.seconds("vision") + clock.seconds("projector"),
            prefill_seconds=clock.seconds("prefill"),
            decode_seconds=clock.seconds("decode"),
            decode_steps=clock.count("decode"),
            signal_seconds=clock.seconds("encoder signals"),
            method_seconds=clock.seconds("method") + clock.seconds("decoder signals"),
            engine_seconds=max(clock.seconds("engine") - clock.seconds("method"), 0.0),
            flops=prefill_flops(config, live, active),
            flops_unmodified=prefill_flops(config, before, before),
        )

    def _install(self) -> None:
        parts, hook = self.anatomy, self._hook
        hook(parts.vision, self._before_vision, pre=True)
        hook(parts.vision, lambda *_: self._clock.stop("vision"))
        if parts.encoder is not None:
            hook(parts.encoder.projector, self._before_projector, pre=True)
            hook(parts.encoder.projector, lambda *_: self._clock.stop("projector"))
        hook(parts.multimodal, self._before_multimodal, pre=True)
        hook(parts.language_model, self._before_language_model, pre=True)
        hook(parts.language_model, self._after_language_model)
        if not self.recipe.methods:
            return
        for layer, module in enumerate(parts.layers):
            hook(module, self._before_layer(layer), pre=True)
            hook(module, self._after_layer(layer))
        self._listen()
        self._refuse_other_ways_of_generating()

    def _hook(self, module: nn.Module, function: Callable[..., Any], pre: bool = False) -> None:
        if pre:
            handle = module.register_forward_pre_hook(function, with_kwargs=True)
        else:
            handle = module.register_forward_hook(function, with_kwargs=True)
        self._undo.append(handle.remove)

    def _listen(self) -> None:
        program, parts = self._program, self.anatomy
        listeners: dict[nn.Module, probe.Listener] = {}
        if parts.encoder is not None:
            for layer in program.encoder_signals:
                listeners[parts.encoder.attention[layer]] = self._observe_encoder(layer)
        for layer in program.decoder_signals:
            listeners[parts.attention(layer)] = self._observe_decoder(layer)
        if listeners:
            self._undo.append(probe.Probe(listeners).close)

    def _refuse_other_ways_of_generating(self) -> None:
        """Continuous batching has caches of its own; chunks of a prompt are too little for methods inside the model."""
        model: Any = self.anatomy.model
        inside = [m.name for m in self.recipe.methods if not isinstance(m, ItemTokens)]

        def batching(*args: Any, **kwargs: Any) -> Any:
            raise SaccadeError(f"continuous batching: not possible under {self.recipe}; use generate() with a batch")

        def prefill(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            if inside and generation_config.prefill_chunk_size is not None:
                raise SaccadeError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size}: {inside[0]} needs the prompt in one "
                    "forward; use prefill_chunk_size=None"
                )
            return type(model)._prefill(model, input_ids, generation_config, *args, **kwargs)

        for name, function in {"init_continuous_batching": batching, "_prefill": prefill}.items():
            if hasattr(model, name):
                model.__dict__[name] = function
                self._undo.append(lambda name=name: model.__dict__.pop(name))  # type: ignore[misc]

    # Hooks, in the order in which a request meets them.

    def _before_vision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._clock.reset("vision", "projector", "encoder signals")
        self._grids = self.anatomy.grids(args, kwargs)
        self._encoded.clear()
        self._clock.start("vision")

    def _observe_encoder(self, layer: int) -> probe.Listener:
        encoder = self.anatomy.encoder
        assert encoder is not None
        skip = int(encoder.has_cls)

        def listener(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
            with self._clock.lap("encoder signals"):
                for signal in self._program.encoder_signals[layer]:
                    if isinstance(signal, Columns):
                        self._encoded[signal] = probe.columns(query, key, scale)[:, skip:]
                    else:
                        logits = probe.row_logits(query[:, :, :1], key, scale)
                        self._encoded[signal] = Attention(logits[..., skip:], logits.logsumexp(-1))

        return listener

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._program.features:
            self._encoded[Features()] = args[0]
        self._clock.start("projector")

    def _before_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        self._incoming = kwargs
        cache = kwargs.get("past_key_values")
        if self.recipe.methods and cache is not None:
            # Before the model sizes its masks, which some families do outside of the language model.
            adopt(cache, len(self.anatomy.layers), self)

    def _before_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        embeds: Tensor = kwargs["inputs_embeds"]
        kwargs = dict(kwargs)
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        if past == 0:
            self._clock.reset("prefill", "decode", "method", "decoder signals", "engine")
        self._clock.start("decode" if past else "prefill")
        wanted = kwargs.get("use_cache")
        self._drop_cache = cache is None and not (self.anatomy.config.use_cache if wanted is None else wanted)
        if cache is None:
            cache = kwargs["past_key_values"] = DynamicCache(config=self.anatomy.config)
        self._cache = cache
        caches = adopt(cache, len(self.anatomy.layers), self) if self.recipe.methods else None
        incoming, self._incoming = self._incoming, None
        intake = (
            Intake.plain(*embeds.shape[:2])
            if incoming is None or embeds.shape[1] == 1
            else Intake.read(self.anatomy, incoming, self._grids)
        )
        positions = self._positions(kwargs.get("position_ids"), embeds, past)
        if caches is None:
            self._record_unmodified(intake, positions, past)
            return args, kwargs
        with self._clock.lap("engine"):
            self._state.begin("prefill" if past else "request")
            self._take_deepstack(kwargs)
            self._run = Run(self._program, self.anatomy, caches, intake, positions, self._encoded, self._state, self._clock)
        return args, kwargs

    def _before_layer(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self._run
            if run is None:
                return None
            if run.rows == 1:
                x, kwargs = run.enter(layer, args[0], kwargs)
            else:
                with self._clock.lap("engine"):
                    x, kwargs = run.enter(layer, args[0], kwargs)
            return (x, *args[1:]), kwargs

        return hook

    def _observe_decoder(self, layer: int) -> probe.Listener:
        def listener(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
            if self._run is not None and self._run.rows > 1:
                self._run.observe(layer, query, key, scale, mask)

        return listener

    def _after_layer(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            run = self._run
            if run is None:
                return output
            if run.rows == 1:
                return run.leave(layer, output)
            with self._clock.lap("engine"):
                return run.leave(layer, output)

        return hook

    def _after_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run, self._run = self._run, None
        if run is not None:
            with self._clock.lap("engine"):
                output["last_hidden_state"] = run.finish(output["last_hidden_state"])
            if run.reads_images or run.past == 0:
                self._record(run.layouts, run.past, run.kept)
        self._kv_bytes = tuple(_bytes(layer) for layer in self._cache.layers)
        del self._cache
        if self._drop_cache:
            output["past_key_values"] = None
        self._clock.stop("decode")
        self._clock.stop("prefill")
        return output

    def _record(self, layouts: list[Layout], past: int, kept: list[Tensor | None]) -> None:
        if past == 0:
            self.trace.log, self.trace.kept = [], kept
        if layouts and any(layouts[0].items):
            self.trace.log.append(layouts)
        if layouts:
            self._prefill = layouts

    def _record_unmodified(self, intake: Intake, positions: Tensor, past: int) -> None:
        if positions.shape[2] > 1:
            layout = Layout.build(intake.visual, intake.valid, positions, intake.items)
            self._record([layout] * (len(self.anatomy.layers) + 1), past, [])

    def _positions(self, given: Tensor | None, embeds: Tensor, past: int) -> Tensor:
        """``[R, B, N]``, as the language model would make them itself."""
        batch, rows = embeds.shape[:2]
        if given is None:
            given = torch.arange(past, past + rows, device=embeds.device)[None]
        return (given if given.ndim == 3 else given[None]).expand(-1, batch, -1)

    def _take_deepstack(self, kwargs: dict[str, Any]) -> None:
        """Take over what the language model would add to visual rows after its first layers."""
        levels = kwargs.pop("deepstack_visual_embeds", None)
        where = kwargs.pop("visual_pos_masks", None)
        if levels is None or where is None:
            return
        stacked = torch.stack(list(levels), dim=1)  # [visual, L, D]
        rows = stacked.new_zeros(*where.shape, *stacked.shape[1:])
        self._state.put("prefill", "deepstack", rows.masked_scatter(where[..., None, None], stacked), rows=True)


def _bytes(layer: Any) -> int:
    if not isinstance(getattr(layer, "keys", None), Tensor):
        return 0
    return int(layer.keys.nbytes + layer.values.nbytes)


def _is_sliding(parts: Anatomy, layer: int) -> bool:
    types = getattr(parts.config, "layer_types", None)
    return types is not None and "sliding" in types[layer]
