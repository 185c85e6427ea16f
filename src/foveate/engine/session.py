"""``attach``: a recipe, running inside a model until it is detached."""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Cache, Companion, ItemTokens, Method, Plan, Traits
from foveate.core.recipe import Recipe
from foveate.core.report import Report, Trace
from foveate.core.shape import Shape
from foveate.core.signal import Seen, on
from foveate.core.state import State
from foveate.core.step import Held, Step
from foveate.engine import blocks, experts, probe
from foveate.engine.cache import FoveateLayer, adopt
from foveate.engine.check import check
from foveate.engine.clock import Clock
from foveate.engine.flops import prefill_flops
from foveate.engine.intake import Intake
from foveate.engine.program import Program
from foveate.engine.run import Run
from foveate.engine.vision import Kind, Look, encoded
from foveate.models.anatomy import Anatomy, anatomy
from foveate.ops import ragged

_SESSIONS: weakref.WeakKeyDictionary[nn.Module, Session] = weakref.WeakKeyDictionary()


def attach(
    model: nn.Module,
    recipe: Recipe | Method | str,
    *,
    seed: int = 0,
    companion: Companion | None = None,
    artifacts: Iterable[Artifact] = (),
) -> Session:
    """Run ``recipe`` inside ``model`` until the session is detached (or its ``with`` block ends).

    Args:
        model: a vision-language model loaded through transformers.
        recipe: a `Recipe`, a method, or text such as ``"hiprune(keep=64) + snapkv(keep=0.5)"``; ``"none"`` only measures.
        seed: seed of methods that draw.
        companion: a text tower for methods that compare the question with the picture.
        artifacts: calibrated numbers, besides those that lie in the checkpoint's folder.

    Raises:
        FoveateError: if the model is not supported, has a session already, or cannot host the recipe. Nothing is left
            half-attached.
    """
    parts = anatomy(model)
    recipe = Recipe.of(recipe)
    if model in _SESSIONS:
        raise FoveateError(f"model: already runs under {_SESSIONS[model].recipe}; detach that session first")
    traits = parts.traits(companion is not None, artifacts)
    check(recipe, parts, traits)
    return Session(parts, recipe, traits, seed, companion)


class Session:
    """A recipe at work in a model. Made by `attach`.

    Attributes:
        recipe: what runs.
        trace: which visual tokens are alive where, for the last request.
        attached: whether it is still at work.
        read: for calibration, the layout and all signals of the last prompt.
    """

    def __init__(
        self, parts: Anatomy, recipe: Recipe, traits: Traits, seed: int, companion: Companion | None = None
    ) -> None:
        self.recipe = recipe
        self.anatomy = parts
        self.trace = Trace()
        self.attached = True
        self._program = Program(tuple(method.fitted(traits) for method in recipe.methods), parts, traits)
        self._companion = companion
        self._clock = Clock(parts.home)
        self._state = State()
        self._state.put("session", "seed", seed)
        self._state.put("session", "traits", traits)
        self._seed = seed
        self._incoming: Mapping[str, Any] | None = None
        self._looks: list[Look] = []
        self._look: Look | None = None
        self._looks_read = False
        self._run: Run | None = None
        self.read: tuple[Layout, Seen] | None = None
        self._generating: bool | None = None
        self._prefill: list[Layout] = []
        self._pictures = (0, 0)
        self._ran: list[tuple[Any, Any]] = []
        self._slots: dict[int, Tensor] = {}
        self._written: list[Layout] = []
        self._kv_bytes: tuple[int, ...] = ()
        self._drop_cache = False
        self._labels: Tensor | None = None
        self._prompt: int | None = None
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
        self._run = self._incoming = self._look = None
        self._looks = []
        _SESSIONS.pop(self.anatomy.model, None)

    def retain(self) -> None:
        """Keep the signals of all layers to the end of each forward, in `read`; for calibration."""
        self._program.retain = True

    def watch(self) -> None:
        """From now on remember what each method sees and does, in `trace`; for inspection."""
        self._program.watched = True

    @property
    def looks_into_encoder(self) -> bool:
        """Whether a method acts or reads before the projector's output; if not, that depends on the pictures alone."""
        program = self._program
        acts = any(kind != "projected" for kind, _, _ in program.vision)
        return acts or bool(program.encoder_signals or program.features)

    @property
    def report(self) -> Report:
        """What the last request cost."""
        config, layouts, clock = self.anatomy.config, self._prefill, self._clock
        entering = layouts[:-1]
        samples = max((len(layout.live) for layout in entering), default=0)

        def mean(counts: tuple[int, ...]) -> float:
            return sum(counts) / len(counts)

        before = [tuple(n - v + full for n, v, full in zip(lay.live, lay.visual, lay.originals)) for lay in entering]
        live = [rows for rows, _ in self._ran]
        active = [running for _, running in self._ran]
        visual = [
            tuple(v - (n - rows) for v, n, rows in zip(lay.visual, lay.live, there)) for lay, there in zip(entering, live)
        ]
        ran = {layer: tuple(slots.tolist()) for layer, slots in self._slots.items()}
        return Report(
            recipe=str(self.recipe),
            samples=samples,
            original_visual_tokens=mean(entering[0].originals) if entering else 0.0,
            visual_tokens=tuple(map(mean, visual)),
            rows=tuple(map(mean, live)),
            active=tuple(map(mean, active)),
            kv_bytes=self._kv_bytes,
            workspace=sum(method.workspace(self._shape(before[0])) for method in self._program.methods) if before else 0,
            encode_seconds=clock.seconds("vision") + clock.seconds("projector"),
            prefill_seconds=clock.seconds("prefill"),
            decode_seconds=clock.seconds("decode"),
            decode_steps=clock.count("decode"),
            signal_seconds=clock.seconds("encoder signals"),
            method_seconds=clock.seconds("method") + clock.seconds("decoder signals"),
            engine_seconds=max(clock.seconds("engine") - clock.seconds("method"), 0.0),
            flops=prefill_flops(config, live, active, self._chosen(active) | ran),
            flops_unmodified=prefill_flops(config, before, before, self._chosen(before)),
        )

    def _chosen(self, active: list[Any]) -> dict[int, tuple[int, ...]]:
        """Experts that the router chooses for the active rows, by layer with experts and sample."""
        traits = self._program.traits
        return {layer: tuple(traits.experts * n for n in active[layer]) for layer in traits.sparse if active}

    def _shape(self, rows: tuple[int, ...]) -> Shape:
        """The last prompt, of so many ``rows`` before anything was dropped."""
        config, encoder, cell = self.anatomy.config, self.anatomy.encoder, self._program.traits.cell
        heads, (images, image_rows) = config.num_attention_heads, self._pictures
        return Shape(
            samples=len(rows),
            rows=max(rows),
            visual=max(self._prefill[0].originals),
            layers=len(self.anatomy.layers),
            width=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            itemsize=next(self.anatomy.layers[0].parameters()).element_size(),
            images=images,
            image_rows=image_rows,
            image_width=encoder.width if encoder else 0,
            image_heads=encoder.heads if encoder else 0,
            cls=self._program.traits.has_cls,
            cell=math.prod(cell) if cell else 0,
        )

    def _install(self) -> None:
        parts, hook, program = self.anatomy, self._hook, self._program
        for kind in ("image", "video"):
            self._wrap_features(kind)
        if parts.encoder is not None and self.recipe.methods:
            self._install_vision()
        hook(parts.vision, self._before_vision, pre=True)
        hook(parts.vision, self._after_vision)
        if parts.encoder is not None:
            hook(parts.encoder.projector, self._before_projector, pre=True)
            hook(parts.encoder.projector, self._after_projector)
        hook(parts.multimodal, self._before_multimodal, pre=True)
        hook(parts.language_model, self._before_language_model, pre=True)
        hook(parts.language_model, self._after_language_model)
        self._watch_generation()
        if not self.recipe.methods:
            return
        hook(parts.model, self._before_model, pre=True)
        for layer, module in enumerate(parts.layers):
            hook(module, self._before_layer(layer), pre=True)
            hook(module, self._after_layer(layer))
        for layer in program.experts:
            self._undo.append(experts.install(parts.experts(layer), self._weigh(layer)))
        for layer in program.halves:
            for number, part in enumerate(parts.halves(layer)):
                hook(part, self._observe_half(layer, number))
        self._listen()

    def _install_vision(self) -> None:
        """Hooks in the encoder's blocks, where rows are to go there."""
        encoder, program = self.anatomy.encoder, self._program
        assert encoder is not None
        inside = {layer for kind, layer, _ in program.vision if kind == "encoder"}
        if not inside and ("patches", 0, "before") not in program.vision:
            return
        for layer, block in enumerate(encoder.blocks):
            if ("encoder", layer, "middle") in program.vision and encoder.halves is not None:
                self._undo.append(blocks.install(block, encoder.halves, self._middle(layer)))
            if not encoder.packed:
                self._hook(block, self._before_block(layer), pre=True)
                self._hook(block, self._after_block(layer))

    def _wrap_features(self, kind: Kind) -> None:
        """Look at the call that encodes images (videos), which no hook reaches."""
        owner: Any = self.anatomy.multimodal
        name = f"get_{kind}_features"
        original = getattr(owner, name, None)
        if original is None:
            return
        signature = inspect.signature(original)

        @functools.wraps(original)
        def features(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if self._looks_read:
                self._looks, self._looks_read = [], False
            if not self._looks:
                self._clock.reset("vision", "projector", "encoder signals")
            arguments = {**bound.arguments, **bound.arguments.get("kwargs", {})}
            look = Look(self._program, self.anatomy, kind, arguments, self._clock, self._companion, self._seed)
            self._look = look
            try:
                output = original(*args, **kwargs)
                look.finish(output)
            finally:
                self._look = None
            self._looks.append(look)
            return output

        self._undo.append(blocks.stand_in(owner, name, features))

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
        attending = [layer for layer in range(len(parts.layers)) if layer not in program.traits.recurrent]
        stand_ins = {parts.attention(layer): self._attend(layer) for layer in attending}
        self._undo.append(probe.Probe(listeners, stand_ins).close)

    def _watch_generation(self) -> None:
        """Know where a turn begins; refuse ways of generating that cut prompts up or have their own cache."""
        model: Any = self.anatomy.model
        owner = self._program.cache
        inside = [m.name for m in self.recipe.methods if not isinstance(m, ItemTokens) or isinstance(m, Cache)]

        def batching(*args: Any, **kwargs: Any) -> Any:
            raise FoveateError(f"continuous batching: not possible under {self.recipe}; use generate() with a batch")

        def prefill(input_ids: Tensor, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
            if inside and generation_config.prefill_chunk_size is not None:
                raise FoveateError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size}: {inside[0]} needs the prompt in one "
                    "forward; use prefill_chunk_size=None"
                )
            return type(model)._prefill(model, input_ids, generation_config, *args, **kwargs)

        def candidates(*args: Any, **kwargs: Any) -> Any:
            if owner is not None and type(owner).step is not Cache.step:
                raise FoveateError(
                    f"assisted decoding: {owner.name} evicts with every token, and what is gone cannot be taken back; "
                    "leave out prompt_lookup_num_tokens and assistant_model"
                )
            source = type(model)._get_candidate_generator(model, *args, **kwargs)
            propose = source.get_candidates

            def get_candidates(input_ids: Tensor, **options: Any) -> Any:
                # Candidates beside the prompt would be read as a part of it.
                return (input_ids, None) if self._generating else propose(input_ids, **options)

            source.get_candidates = get_candidates
            return source

        def generate(*args: Any, **kwargs: Any) -> Any:
            self._generating = True  # until the prompt was read
            self._looks = []
            try:
                return type(model).generate(model, *args, **kwargs)
            finally:
                self._generating = None

        replaced: dict[str, Callable[..., Any]] = {"generate": functools.wraps(model.generate)(generate)}
        if self.recipe.methods:
            replaced["init_continuous_batching"] = batching
            replaced["_prefill"] = prefill
            replaced["_get_candidate_generator"] = candidates
        for name, function in replaced.items():
            if hasattr(model, name):
                self._undo.append(blocks.stand_in(model, name, function))

    # Hooks, in the order in which a request meets them.

    def _before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take over the labels, so that rows that are dropped need predict nothing."""
        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise FoveateError(
                f"gradient checkpointing: not possible under {self.recipe}, as layers that are run again have no cache and "
                "show no attention; turn it off"
            )
        if kwargs.get("labels") is None:
            return None
        self._labels = kwargs["labels"].clone()
        return args, dict(kwargs, labels=self._labels)

    def _before_vision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._clock.start("vision")
        return None if self._look is None else self._look.before_vision(args, kwargs)

    def _after_vision(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self._look is not None:
            self._look.after_vision(output)
        self._clock.stop("vision")

    def _before_block(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return None if self._look is None else self._look.enter_block(layer, args, kwargs)

        return hook

    def _middle(self, layer: int) -> blocks.Middle:
        return lambda x: x if self._look is None else self._look.middle(layer, x)

    def _after_block(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self._look is None:
                return None
            if isinstance(output, tuple):
                return (self._look.leave_block(layer, output[0]), *output[1:])
            return self._look.leave_block(layer, output)

        return hook

    def _observe_encoder(self, layer: int) -> probe.Listener:
        def listener(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
            if self._look is not None:
                self._look.observe(layer, query, key, scale, mask)

        return listener

    def _before_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._clock.start("projector")
        if self._look is None or not self.recipe.methods:
            return None
        return (self._look.before_projector(args[0]), *args[1:]), kwargs

    def _after_projector(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if self._look is not None and self.recipe.methods:
            output = self._look.after_projector(output)
        self._clock.stop("projector")
        return output

    def _before_multimodal(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if args:
            kwargs = {"input_ids": args[0], **kwargs}
        self._incoming = kwargs
        if any(kwargs.get(name) is not None for name in ("pixel_values", "pixel_values_videos")):
            self._looks = []  # encoded from now on; what was before has not come to a prompt
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
            else Intake.read(
                self.anatomy,
                incoming,
                self._looks,
                labels=self._labels,
                # Without a cache, generate reads the prompt again with every token, and what it wrote since.
                prompt=self._prompt if self._generating is False and past == 0 else None,
            )
        )
        if self._generating is None and incoming is not None and self.recipe.methods:
            intake.refuse_packed(incoming)
        self._looks_read = True
        turn = embeds.shape[1] > 1 and self._generating is not False
        if self._generating:
            self._generating, self._prompt = False, embeds.shape[1]
        positions = self._positions(kwargs.get("position_ids"), embeds, past)
        if caches is None:
            self._record_unmodified(intake, positions, past)
            return args, kwargs
        with self._clock.lap("engine"):
            self._state.begin("prefill" if past else "request")
            self._take_deepstack(kwargs, embeds.device)
            self._run = Run(
                self._program,
                self.anatomy,
                caches,
                intake,
                positions,
                self._looks if any(map(len, intake.items)) else (),
                self._state,
                self._clock,
                turn=turn,
                companion=self._companion,
            )
        return args, kwargs

    def _before_layer(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            run = self._run
            if run is None:
                return None
            with run.timed("engine"):
                x, kwargs = run.enter(layer, args[0], kwargs)
            return (x, *args[1:]), kwargs

        return hook

    def _weigh(self, layer: int) -> Callable[[Tensor, Tensor], Tensor]:
        def weigh(index: Tensor, weights: Tensor) -> Tensor:
            run = self._run
            if run is None:
                return weights
            with run.timed("engine"):
                return run.weigh(layer, index, weights)

        return weigh

    def _observe_decoder(self, layer: int) -> probe.Listener:
        def listener(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
            if self._run is not None and self._run.rows > 1:
                self._run.observe(layer, query, key, scale, mask)

        return listener

    def _observe_half(self, layer: int, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if self._run is not None and self._run.rows > 1:
                self._run.observe_half(layer, number, output[0] if isinstance(output, tuple) else output)

        return hook

    def _attend(self, layer: int) -> probe.StandIn:
        """Attention over entries that are stored by head."""

        def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor | None:
            cache = self._cache.layers[layer] if self._run is not None else None
            if not isinstance(cache, FoveateLayer) or cache.blocks is None:
                return None
            allowed = None
            if mask is not None or query.shape[2] > 1:
                rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
                allowed = probe.visible(mask, rows, query.shape[2], key.shape[2])
            return ragged.attend(query, cache.blocks, key, value, allowed, scale)

        return attention

    def _after_layer(self, layer: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            run = self._run
            if run is None:
                return output
            with run.timed("engine"):
                return run.leave(layer, output)

        return hook

    def _after_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        run, self._run = self._run, None
        labels, self._labels = self._labels, None
        if run is not None:
            with self._clock.lap("engine"):
                output["last_hidden_state"] = run.finish(output["last_hidden_state"])
                if labels is not None and run.edited:
                    labels[:, 1:].masked_fill_(~run.alive[:, :-1].to(labels.device), -100)
            if self._program.retain:
                device = output["last_hidden_state"].device
                self.read = run.layouts[0].to(device), on(run.seen, device)
            if run.reads_images or run.past == 0:
                self._record(run.layouts, run.past, run.ran, run.routes, run.slots)
            if self._program.watched and run.rows > 1:
                self._remember(run)
            run.close()
        self._kv_bytes = tuple(_bytes(layer) for layer in self._cache.layers)
        del self._cache
        if self._drop_cache:
            output["past_key_values"] = None
        self._clock.stop("decode")
        self._clock.stop("prefill")
        return output

    def _record(
        self,
        layouts: list[Layout],
        past: int,
        ran: list[tuple[Any, Any]],
        routes: list[Plan | None],
        slots: dict[int, Tensor],
    ) -> None:
        if past == 0:
            self.trace.log, self.trace.routes = [], []
        if layouts and any(layouts[0].items):
            self.trace.log.append(layouts)
            self.trace.routes.append(routes)
        if layouts:
            self._prefill, self._ran, self._slots = layouts, ran, slots
            self._pictures = encoded(self.anatomy.encoder, self._looks)

    def _remember(self, run: Run) -> None:
        """What methods did, and what the caches hold since; for inspection."""
        trace, batch = self.trace, run.layouts[0].shape[0]
        if run.past == 0:
            trace.steps, trace.held, trace.pictures, self._written = [], [], [], []
        if run.reads_images:
            self._written = self._written or run.cached
            for look in sorted(self._looks, key=lambda look: look.kind):
                trace.steps += [_renumbered(step, len(trace.pictures)) for step in look.steps]
                first = trace.pictures[-1] + 1 if trace.pictures else 0
                trace.pictures += [first + number for number, picture in enumerate(look.pictures) for _ in picture.views]
        trace.steps += run.steps
        trace.held = [
            Held(layout, *(ledger.tokens(batch, layout.origin.device) for ledger in (cache.whole, cache.ledger)))
            if isinstance(cache, FoveateLayer)
            else None
            for layout, cache in zip(self._written, self._cache.layers)
        ]

    def _record_unmodified(self, intake: Intake, positions: Tensor, past: int) -> None:
        if positions.shape[2] > 1:
            layout, layers = intake.layout(positions), len(self.anatomy.layers)
            self._record([layout] * (layers + 1), past, [(layout.live, layout.live)] * layers, [None] * layers, {})

    def _positions(self, given: Tensor | None, embeds: Tensor, past: int) -> Tensor:
        """``[R, B, N]``, as the language model would make them itself."""
        batch, rows = embeds.shape[:2]
        if given is None:
            given = torch.arange(past, past + rows, device=embeds.device)[None]
        return (given if given.ndim == 3 else given[None]).expand(-1, batch, -1)

    def _take_deepstack(self, kwargs: dict[str, Any], device: torch.device) -> None:
        """Take over what the language model would add to visual rows after its first layers."""
        levels = kwargs.pop("deepstack_visual_embeds", None)
        where = kwargs.pop("visual_pos_masks", None)
        if levels is None or where is None:
            return
        stacked = torch.stack([level.to(device) for level in levels], dim=1)  # [visual, L, D]
        rows = stacked.new_zeros(*where.shape, *stacked.shape[1:])
        filled = rows.masked_scatter(where.to(device)[..., None, None], stacked)
        self._state.put("prefill", "deepstack", filled, rows=True)


def _renumbered(step: Step, grids: int) -> Step:
    """A step with its grids counted behind so many others."""
    return replace(step, places={number + grids: place for number, place in (step.places or {}).items()})


def _bytes(layer: Any) -> int:
    if isinstance(layer, FoveateLayer):
        return layer.nbytes
    if not isinstance(getattr(layer, "keys", None), Tensor):
        return 0
    return int(layer.keys.nbytes + layer.values.nbytes)
