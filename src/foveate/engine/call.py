"""One call of a model under a recipe, on one thread, from its outermost entry to its return.

Everything that belongs to a call is here, so nothing of it outlives the call, whether it returns or dies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foveate.core.layout import Layout
from foveate.core.signal import Seen, on
from foveate.engine import ahead, hearing
from foveate.engine.arguments import by_name
from foveate.engine.cache import Owner, adopt
from foveate.engine.check import check_call, check_training
from foveate.engine.decoding import Decoding
from foveate.engine.films import Beside
from foveate.engine.intake import Intake, on_host
from foveate.engine.pictures import refuse_unprepared
from foveate.engine.program import Program
from foveate.engine.recording import Recording
from foveate.engine.rows import positions_of
from foveate.engine.run import Run
from foveate.engine.vision import Kind, Look
from foveate.models import taps

LOOK = "_foveate_look"
"""Attribute of an encoder's output that says what it was made of, for prompts that come later."""


class Call:
    """One call of the model, or of a part of it.

    Attributes:
        prompt_is_read: whether what comes now is generated or tried out.
        looks: calls of the encoder whose pictures the prompt shows.
        look: the one that is going on.
        ear: what the encoder of sound showed.
        run: the forward of the language model that is going on, where it has anything to do in the layers.
        read: for calibration, the layout and all signals of the prompt.
    """

    def __init__(
        self,
        program: Program,
        owner: Owner,
        earlier: Recording | None,
        beside: Beside,
        *,
        generating: bool = False,
    ) -> None:
        self.look: Look | None = None
        self.run: Run | Decoding | ahead.Ahead | None = None
        self.read: tuple[Layout, Seen] | None = None
        self._program, self._owner = program, owner
        self._earlier, self._beside = earlier, beside
        self._begun = program.now()
        self._awaited = True
        self._generating = generating
        self._in_parts = False
        self._caching = True
        self._prompt_rows: int | None = None
        self.prompt_is_read = False
        self.looks: list[Look] = []
        self.ear = hearing.Ear()
        self._incoming: Mapping[str, Any] | None = None
        self._with_head = False
        self._labels: Tensor | None = None
        self._cache: DynamicCache | None = None
        self._rows = 0

    @cached_property
    def recording(self) -> Recording:
        """What it costs; of the prompt before, where this is a step of a loop of the caller's own."""
        return Recording(self._program)

    # Pictures.

    def know(self, outputs: Any) -> None:
        """Pictures that were encoded before this call, as it was given them."""
        for output in (outputs or {}).values():
            look = getattr(output, LOOK, None)
            if isinstance(look, Look) and look.program is self._program and look not in self.looks:
                self.looks.append(look)

    def encode(self, kind: Kind, bound: Mapping[str, Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run ``get_image_features`` or ``get_video_features``, whose ``bound`` arguments these are."""
        if self.look is not None:  # a family may encode videos by the function that encodes pictures
            return original(*args, **kwargs)
        refuse_unprepared(self._program)
        look = self.look = Look(self._program, kind, bound, self.recording.clock, self._beside)
        attentions = self._program.anatomy.encoder_attention
        listening = [attentions[layer] for layer in self._program.encoder_signals]
        try:
            with taps.tapped(listening):
                output = original(*args, **kwargs)
            look.finish(output)
            if self._beside.memory is not None and look.memory is not None:
                self._beside.memory.take(look.memory)
        finally:
            self.look = None
        self.looks.append(look)
        return output

    def vision(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the vision tower."""
        with self.recording.clock.lap("vision"):
            if self.look is None:
                return original(*args, **kwargs)
            args, kwargs = self.look.before_vision(args, kwargs)
            output = original(*args, **kwargs)
            self.look.after_vision(output)
            return output

    def block(self, layer: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block of the encoder."""
        look = self.look
        if look is None:
            return original(*args, **kwargs)
        args, kwargs = look.enter_block(layer, args, kwargs)
        output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return (look.leave_block(layer, output[0]), *output[1:])
        return look.leave_block(layer, output)

    def projector(self, original: Callable[..., Any], x: Tensor, *args: Any, tower: int = 0, **kwargs: Any) -> Any:
        """Run the projector of an encoder."""
        with self.recording.clock.lap("projector"):
            if self.look is None or not self._program.methods:
                return original(x, *args, **kwargs)
            return self.look.after_projector(original(self.look.before_projector(x, tower), *args, **kwargs), tower)

    # The whole model, from outside to inside.

    def model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the model: rows that are dropped need predict nothing."""
        self._with_head = True
        if self._program.methods:
            check_training(self._program)
            kwargs, args = (by_name(original, args, kwargs) if args else kwargs), ()
            if kwargs.get("labels") is not None:
                kwargs["labels"] = self._labels = kwargs["labels"].clone()
        output = original(*args, **kwargs)
        if self._awaited:
            self.logits_are_there()
        return output

    def multimodal(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run what merges pictures and text."""
        incoming = by_name(original, args, kwargs) if args else kwargs
        if not self._with_head and incoming.get("labels") is not None:  # then they only say where answers begin
            incoming = dict(incoming)
            self._labels = incoming.pop("labels").clone()
        packed = not self._generating and bool(self._program.methods)
        self._incoming = on_host(incoming, self._labels, positions=packed)
        if incoming.get("pixel_values") is not None or incoming.get("pixel_values_videos") is not None:
            self.looks = []  # encoded from now on; what was before has not come to a prompt
        elif not self.looks and incoming.get("mm_encoder_outputs") is not None:
            self.know(incoming["mm_encoder_outputs"])
        cache = incoming.get("past_key_values")
        if self._program.methods and cache is not None:
            # Before the model sizes its masks, which some families do outside of the language model.
            adopt(cache, len(self._program.anatomy.layers), self._owner)
        try:
            return original(**incoming)
        finally:
            self._incoming = None

    def language_model(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run the language model: a prompt, a part of one, tokens that are tried out, or a step of decoding."""
        kwargs, program = by_name(original, args, kwargs) if args else kwargs, self._program
        given = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        batch, rows = given.shape[:2]
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        prompt = past == 0 or (not self.prompt_is_read if self._generating else rows > 1)
        if not prompt and rows == 1 and not (program.experts or program.exits):
            return self._step(original, kwargs, cache, past, given)

        config = program.anatomy.config
        wanted = kwargs.pop("return_dict", None)
        as_tuple = not (config.return_dict if wanted is None else wanted)
        wanted = kwargs.get("use_cache")
        unwanted = cache is None and not (config.use_cache if wanted is None else wanted)
        check_call(program, kwargs, unwanted)
        self._caching = not unwanted
        branch = self._is_branch(cache, rows)
        recording = Recording(program) if branch else self.recording
        # Without a cache, generate reads the prompt again with every token.
        begins = prompt and not (self._generating and self.prompt_is_read)
        if cache is None and program.methods:  # without a recipe the model finds packed rows, where it has none
            cache = kwargs["past_key_values"] = DynamicCache(config=config)
        with ExitStack() as stack, recording.clock.lap("prefill" if begins else "decode"):
            positions = positions_of(kwargs.get("position_ids"), batch, rows, past, given.device)
            run = None
            if program.methods:
                run, kwargs = self._begin(recording, cache, kwargs, positions, past, prompt, stack)
                if program.ahead and run.rows.has_pictures:
                    ahead.offer(self, run, original, kwargs)
            elif begins and not branch:
                recording.unmodified(self._intake(batch, rows, past), positions, self.looks)
            try:
                output = original(**kwargs, return_dict=True)
                if run is not None:
                    self._end(recording, run, output, prompt or run.rows.has_pictures)
            finally:
                self.run = None
                if run is not None:
                    run.close()
        if self._prompt_rows is None:
            self._prompt_rows = rows
        if prompt and not branch and not self._in_parts:
            self.prompt_was_read()
        if unwanted:
            output["past_key_values"] = None
        if not branch:
            kept = output.past_key_values if cache is None else cache
            self._cache, self._rows = None if unwanted else kept, rows
        return output.to_tuple() if as_tuple else output

    def _step(self, original: Callable[..., Any], kwargs: dict[str, Any], cache: Any, past: int, given: Tensor) -> Any:
        """One token more: nothing is dropped and nothing is watched, so this does as little as it can."""
        # A second branch (guidance) is not what was asked for. Steps of a loop of the caller's own are the prompt's.
        recording = None if self._is_branch(cache, 1) else self.recording if self._generating else self._earlier
        begun = None if recording is None else recording.clock.now()
        tap = None
        if self._program.methods:
            layers = adopt(cache, len(self._program.anatomy.layers), self._owner)
            decoding = Decoding.of(cache, self._program, layers, past, self._padding(kwargs), self._generating)
            kwargs = decoding.begin(kwargs, given, past)
            self.run = decoding if decoding.busy else None
            if decoding.heard:
                tap = taps.tapped(self._attentions(range(len(layers))))
        try:
            if tap is None:
                output = original(**kwargs)
            else:
                with tap:
                    output = original(**kwargs)
        finally:
            self.run = None
        if recording is not None:
            recording.clock.add("decode", begun)
            self.recording, self._cache, self._rows = recording, cache, 1
        return output

    # The course of a generation.

    def reading_in_parts(self) -> None:
        """The prompt comes in several forwards; `prompt_was_read` will be said behind the last one."""
        self._in_parts = True

    def prompt_was_read(self) -> None:
        """What comes now is generated or tried out; nobody asks for pictures or signals any more."""
        self.prompt_is_read, self._in_parts = True, False
        if self._caching:  # else every step reads the prompt again
            self.looks = []

    def logits_are_there(self) -> None:
        """Those of a forward; behind a prompt that is read, they are the first token's."""
        if self._awaited and self.prompt_is_read:
            self._awaited = False
            self.recording.clock.add("first token", self._begun)

    def close(self) -> Recording:
        """The call is over; what it cost."""
        self.recording.clock.add("call", self._begun)
        if self._cache is not None:
            self.recording.holds(self._cache, now=self._generating)
        return self.recording

    # Inside.

    def _is_branch(self, cache: DynamicCache | None, rows: int) -> bool:
        """Whether this is the second branch of guidance, which is not what was asked for."""
        if not self._generating or self._prompt_rows is None:
            return False
        # It has a cache of its own; where there is none, what was asked for comes again and is a token longer.
        return cache is not self._cache if self._caching else rows != self._rows + 1

    def _begin(
        self,
        recording: Recording,
        cache: DynamicCache,
        kwargs: dict[str, Any],
        positions: Tensor,
        past: int,
        prompt: bool,
        stack: ExitStack,
    ) -> tuple[Run, dict[str, Any]]:
        """What goes with this forward, and what the language model is to be called with."""
        program, anatomy = self._program, self._program.anatomy
        layers = adopt(cache, len(anatomy.layers), self._owner)
        kwargs = dict(kwargs)
        hidden = kwargs.pop("output_hidden_states", None)
        hidden = getattr(anatomy.config, "output_hidden_states", False) if hidden is None else hidden
        with recording.clock.lap("engine"):
            intake = self._intake(*positions.shape[1:], past)
            looks = self.looks if any(map(len, intake.items)) else ()
            run = Run(program, layers, intake, positions, looks, recording.clock, turn=prompt, hidden=hidden or False)
            run.take_deepstack(kwargs)
            self.ear.hand_over(run)
        heard = [number for number, layer in enumerate(layers) if getattr(layer, "heard", False)]
        stack.enter_context(taps.tapped(self._attentions({*program.decoder_signals, *program.leaning, *heard})))
        self.run = run
        return run, kwargs

    def _padding(self, kwargs: Mapping[str, Any]) -> Tensor | None:
        mask = (self._incoming or kwargs).get("attention_mask")
        return mask if isinstance(mask, Tensor) and mask.ndim == 2 else None

    def _attentions(self, layers: Iterable[int]) -> list[nn.Module]:
        anatomy, recurrent = self._program.anatomy, self._program.traits.recurrent
        return [anatomy.attention(layer) for layer in layers if layer not in recurrent]

    def _intake(self, batch: int, rows: int, past: int) -> Intake:
        if self._incoming is None or rows == 1:
            return Intake.plain(batch, rows, (self._incoming or {}).get("input_ids"))
        # Without a cache, generate reads the prompt again with every token, and what it wrote since.
        prompt = self._prompt_rows if past == 0 and self.prompt_is_read else None
        intake = Intake.read(self._program.anatomy, self._incoming, self.looks, prompt=prompt)
        if self._program.methods:
            intake.refuse_encoded_elsewhere(self.looks)
            if not self._generating:
                intake.refuse_packed(self._incoming)
        return intake

    def _end(self, recording: Recording, run: Run, output: Any, note: bool) -> None:
        with recording.clock.lap("engine"):
            output["last_hidden_state"] = run.finish(output["last_hidden_state"])
            if run.hidden is not None:
                *before, last = run.hidden
                output["hidden_states"] = (*before, last if last is None else output["last_hidden_state"])
            labels = self._labels
            if labels is not None and run.rows.edited:
                labels[:, 1:].masked_fill_(~run.rows.alive[:, :-1].to(labels.device), -100)
        if self._program.retain:
            device = output["last_hidden_state"].device
            self.read = run.layouts[0].to(device), on(run.signals.seen, device)
        recording.left(run.exiting)
        if note and run.rows.given > 1:
            recording.prompt(run, self.looks if run.rows.has_pictures else ())
