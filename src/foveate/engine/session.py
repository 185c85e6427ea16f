"""``attach``: a recipe, running inside a model until it is detached."""

from __future__ import annotations

import copy
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.core.artifact import Artifact
from foveate.core.companion import Companion
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.recipe import Recipe, RecipeLike
from foveate.core.report import Report, Trace
from foveate.core.signal import Seen
from foveate.engine import blocks, experts, generation, hearing, packed, reuse
from foveate.engine.arguments import by_name
from foveate.engine.call import LOOK, Call
from foveate.engine.check import check, warn_untrained
from foveate.engine.commit import Ends
from foveate.engine.handing import Hands
from foveate.engine.pictures import Prepares
from foveate.engine.program import Program
from foveate.engine.recording import Recording
from foveate.engine.run import Run
from foveate.engine.seat import Seat
from foveate.engine.shown import Shown
from foveate.engine.stand_in import Attached, stand_in
from foveate.engine.vision import Kind
from foveate.models import anatomy, taps

SESSION = "_foveate_session"
"""Attribute of a model that runs under a session."""


def attach(
    model: nn.Module,
    recipe: RecipeLike,
    *,
    seed: int = 0,
    companion: Companion | None = None,
    artifacts: Iterable[Artifact] | str | Path = (),
) -> Session:
    """Run ``recipe`` inside ``model`` until the session is detached (or its ``with`` block ends).

    Args:
        model: a vision-language model, or a text model, loaded through transformers.
        recipe: a `Recipe`, a method, text such as ``"hiprune(keep=64) + snapkv(keep=0.5)"``, a path to YAML, a name on the
            Hub, or a list (`Recipe.of` says all forms); ``"none"`` only measures.
        seed: seed of methods that draw.
        companion: a text tower for methods that compare the question with the picture.
        artifacts: calibrated numbers, or the folder where they are; besides those that lie in the checkpoint's own folder.

    Raises:
        FoveateError: if the model is not supported, has a session already, or cannot host the recipe. Nothing is left
            half-attached.

    Warns:
        NeedsTraining: once for each method whose paper trains the model with it.
    """
    parts = anatomy(model)
    recipe = Recipe.of(recipe)
    attached: Session | None = parts.model.__dict__.get(SESSION)
    if attached is not None:
        raise FoveateError(f"model: already runs under {attached.recipe}; detach that session first")
    artifacts = Artifact.all_in(artifacts) if isinstance(artifacts, str | Path) else artifacts
    traits = parts.traits(companion is not None, artifacts)
    check(recipe, parts, traits)
    for method in recipe.methods:
        if method.trained:
            warn_untrained(type(method))
    return Session(Program(recipe, parts, traits, seed=seed, companion=companion))


class Session(Ends, Shown, Prepares, Hands):
    """A recipe at work in a model. Made by `attach`. Several threads may call the model at once.

    Attributes:
        recipe: what runs.
        anatomy: the model, taken apart.
        attached: whether it is still at work.
        committed: whether the weights that it replaced are gone.
    """

    def __init__(self, program: Program) -> None:
        self.recipe, self.anatomy = program.recipe, program.anatomy
        self.attached = True
        self.reference = weakref.ref(self)
        self._program = program
        self._seat = Seat()
        self._last = Recording(program)
        self._undo: list[Callable[[], None]] = []
        try:
            self._install()
        except BaseException:
            self.detach()
            raise

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model is plain: it runs under no session."""

    def __reduce__(self) -> Any:
        raise FoveateError(f"model: runs under {self.recipe}, which cannot be saved with it; detach before saving")

    @property
    def report(self) -> Report:
        """What this thread's last request cost (anybody's last, where this thread has made none)."""
        return self._recording.report()

    @property
    def trace(self) -> Trace:
        """Which visual tokens were alive where, for the same request."""
        return self._recording.trace

    @property
    def read(self) -> tuple[Layout, Seen] | None:
        """For calibration, the layout and all signals of this thread's last prompt."""
        return self._seat.read

    def retain(self) -> None:
        """Keep the signals of all layers to the end of each forward, in `read`; for calibration."""
        self._program.retain = True

    def watch(self) -> None:
        """From now on remember what each method sees and does, in `trace`; for inspection."""
        self._program.watched = True

    def encode(self, **inputs: Any) -> dict[str, Any]:
        """Encode pictures (videos) once, for several prompts.

        Args:
            inputs: what the model would be called with; of it, the pictures are read.

        Returns:
            ``{"mm_encoder_outputs": ...}``, which takes the pictures' place in calls of the model or of ``generate``.
        """
        outputs = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            encode = getattr(self.anatomy.multimodal, f"get_{kind}_features", None)
            if encode is not None and inputs.get(pixels) is not None:
                known = inspect.signature(encode).parameters
                outputs[kind] = encode(**{name: value for name, value in inputs.items() if name in known})
        return {"mm_encoder_outputs": outputs}

    def remembered(self, method: str) -> Any:
        """What a method of that name goes on with from request to request (the bandit of ``uat``); None if nothing."""
        return self._program.constants.get(method)

    @property
    def looks_into_encoder(self) -> bool:
        """Whether a method acts or reads before the projector's output; if not, that depends on the pictures alone."""
        program = self._program
        acts = bool(program.reused) or any(kind != "projected" for kind, _, _ in program.vision)
        return acts or program.pixels or bool(program.encoder_signals or program.features)

    @property
    def _recording(self) -> Recording:
        return self._seat.recording or self._last

    @contextmanager
    def _entered(self, generating: bool = False) -> Iterator[Call]:
        """The call that is going on in this thread, or a new one that ends with this."""
        seat = self._seat
        outer = seat.call
        if outer is not None and not generating:
            yield outer
            return
        call = seat.begin(self._program, self, generating=generating)
        try:
            yield call
            self._end(call)
        finally:
            seat.call = outer

    def _end(self, call: Call) -> None:
        self._last = self._seat.recording = call.close()
        self._seat.read = call.read

    def _install(self) -> None:
        parts, program, put = self.anatomy, self._program, self._put
        put(parts.model, SESSION, self)
        self._undo += packed.install(program, self._current)
        for kind in ("image", "video"):
            if hasattr(parts.multimodal, f"get_{kind}_features"):
                self._stand_in(parts.multimodal, f"get_{kind}_features", self._features, kind)
        self._stand_in(parts.model, "generate", self._generate)
        if hasattr(parts.model, "_prefill"):
            self._stand_in(parts.model, "_prefill", generation.prefill, program, self._current)
        # In a text model the first two are one module; what is put there last is entered first.
        inner = ((parts.language_model, Call.language_model), (parts.multimodal, Call.multimodal))
        for module, body in (*inner, (parts.model, Call.model)):
            self._stand_in(module, "forward", self._outer, body)
        if parts.vision is not None:
            self._stand_in(parts.vision, "forward", self._inner, Call.vision)
        for number, encoder in enumerate(parts.towers):
            body = functools.partial(Call.projector, tower=number) if number else Call.projector
            self._stand_in(encoder.projector, "forward", self._inner, body)
        if program.hears and parts.audio is not None:
            self._stand_in(parts.audio.tower, "forward", self._inner, functools.partial(hearing.hear, parts.audio))
            put(parts.audio.attention, taps.TAP, Attached(hearing.tap, self._current))
        if not self.recipe.methods:
            return
        self._stand_in(parts.model, "init_continuous_batching", generation.batching, program)
        self._stand_in(parts.model, "_get_candidate_generator", generation.candidates, program, self._current)
        self._install_vision()
        for layer, module in enumerate(parts.layers):  # a compiled one would be traced all the same
            around = torch.compiler.disable(self._layer) if layer in program.compiled else self._layer
            self._stand_in(module, "forward", around, layer)
            if layer not in program.traits.recurrent:
                put(parts.attention(layer), taps.TAP, Attached(self._tap, layer))
        for layer, methods in program.experts.items():
            weigh, echo = functools.partial(self._weigh, layer), any(method.echoes for method in methods)
            self._stand_in(parts.experts(layer), "forward", experts.weighed, weigh, echo)
        for layer in program.halves:
            for number, part in enumerate(parts.halves(layer)):
                self._undo.append(part.register_forward_hook(Attached(self._half, layer, number)).remove)

    def _install_vision(self) -> None:
        """In the encoder's blocks, where rows are to go there."""
        parts, program = self.anatomy, self._program
        for layer in program.encoder_signals:
            self._put(parts.encoder_attention[layer], taps.TAP, Attached(self._tap_encoder, layer))
        inside = {layer for kind, layer, _ in program.vision if kind == "encoder"}
        every = bool(inside) or ("patches", 0, "before") in program.vision
        if parts.encoder is not None:
            for layer in program.reused:
                self._undo.append(reuse.install(parts.encoder.blocks[layer], parts.encoder, layer, self._chain))
        for layer, (encoder, block) in enumerate((one, block) for one in parts.towers for block in one.blocks):
            if ("encoder", layer, "middle") in program.vision and encoder.halves is not None:
                self._undo.append(blocks.install(block, encoder.halves, functools.partial(self._middle, layer)))
            if not encoder.packed and (every or (program.summary and layer == encoder.feature_layer)):
                self._stand_in(block, "forward", self._block, layer)

    def _stand_in(self, module: Any, name: str, function: Callable[..., Any], *given: Any) -> None:
        self._undo.append(stand_in(module, name, function, *given))

    def _put(self, module: nn.Module, name: str, value: Any) -> None:
        module.__dict__[name] = value
        self._undo.append(functools.partial(module.__dict__.pop, name, None))

    # What stands in for the model's own functions. Each finds the call of its thread.

    def _current(self) -> Call | None:
        return self._seat.call

    @torch.compiler.disable
    def _generate(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        kwargs = by_name(original, args, kwargs) if args else kwargs
        generation.refuse_assistant(self._program, kwargs.get("assistant_model"))
        with self._entered(generating=True) as call:
            outputs = kwargs.get("mm_encoder_outputs")
            if outputs:  # repeated in place for every beam, and good for another prompt
                kwargs["mm_encoder_outputs"] = {kind: copy.copy(output) for kind, output in outputs.items()}
                call.know(outputs)
            return original(**kwargs)

    @torch.compiler.disable
    def _features(self, kind: Kind, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs)
        bound.apply_defaults()
        arguments: Mapping[str, Any] = {**bound.arguments, **bound.arguments.get("kwargs", {})}
        alone = self._seat.call is None
        with self._entered() as call:
            output = call.encode(kind, arguments, original, *args, **kwargs)
            if alone and call.looks:
                setattr(output, LOOK, call.looks[-1])
            return output

    @torch.compiler.disable
    def _outer(self, body: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._seat.call
        # Not by `_entered`, in a few calls less: each step of decoding passes here for each of three modules.
        if call is not None:
            return body(call, original, *args, **kwargs)
        call = self._seat.begin(self._program, self)
        try:
            output = body(call, original, *args, **kwargs)
            self._end(call)
        finally:
            self._seat.call = None
        return output

    @torch.compiler.disable
    def _inner(self, body: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._seat.call
        return original(*args, **kwargs) if call is None else body(call, original, *args, **kwargs)

    def _block(self, layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        call = self._seat.call
        return original(*args, **kwargs) if call is None else call.block(layer, original, *args, **kwargs)

    def _middle(self, layer: int, x: Tensor) -> Tensor:
        call = self._seat.call
        return x if call is None or call.look is None else call.look.middle(layer, x)

    def _chain(self) -> reuse.Chain | None:
        call = self._seat.call
        return None if call is None or call.look is None else call.look.chain

    def _tap_encoder(self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> None:
        call = self._seat.call
        if call is not None and call.look is not None:
            call.look.observe(layer, query, key, value, scale, mask)

    # All that runs inside of `_outer` is not traced, so this costs a step of decoding no more than one call for each layer.
    def _layer(self, layer: int, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        call = self._seat.call
        if call is None or call.run is None:
            return original(*args, **kwargs)
        return call.run.through(layer, original, args, kwargs)

    def _tap(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        call = self._seat.call
        if call is None or call.run is None:
            return None
        return call.run.attend(layer, query, key, value, mask, scale)

    def _weigh(self, layer: int, index: Tensor, weights: Tensor) -> Tensor:
        call = self._seat.call
        if call is None or not isinstance(call.run, Run):
            return weights
        with call.run.timed("engine"):
            return call.run.weigh(layer, index, weights)

    def _half(self, layer: int, number: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        call = self._seat.call
        if call is not None and isinstance(call.run, Run):
            call.run.observe_half(layer, number, output[0] if isinstance(output, tuple) else output)
