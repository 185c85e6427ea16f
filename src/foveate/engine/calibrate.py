"""Makes the artifact of a method that needs numbers from the model it is to run on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Method, Offline, Tokens
from foveate.core.recipe import Recipe
from foveate.core.signal import Function, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.weights import Weights
from foveate.engine.functions import function
from foveate.engine.idle import check_idle
from foveate.engine.session import attach
from foveate.models import anatomy

Batches = Sequence[Mapping[str, Tensor]]
Labels = Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Reader(Tokens):
    """Reads signals and leaves everything alone."""

    signals: tuple[Signal, ...]
    name = "reader"
    textual = True

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return self.signals

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return ()

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        return None


@dataclass(frozen=True, eq=False)
class _CellReader(Tokens):
    """Takes down the cells that the encoder is about to get."""

    taken: list[tuple[Tensor, Layout]] = field(default_factory=list)
    name = "calibration"

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site("patches"),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        self.taken.append((x, layout))
        return None


class Watcher(Protocol):
    """Follows a calibration, to show it."""

    def begin(self, what: str, steps: int) -> None:
        """Something of so many steps begins."""

    def advance(self) -> None:
        """A step is done."""


class Calibration:
    """A model and calibration prompts, as `Offline` methods see them (a `foveate.core.method.ModelCall`).

    Args:
        model: the model.
        batches: keyword arguments of its forward; with ``labels`` where answers stand behind the prompts (`answers`).
        marks: of each batch the same with other pictures in it, white where the real ones show what counts, else black; for
            methods that learn to tell such places.
        watcher: follows it.
        special: ids of the tokenizer's special tokens; those that the model's configuration names are known without.
        labels: of each batch, what kind of prompt each sample is, for methods that compare kinds.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        marks: Batches = (),
        watcher: Watcher | None = None,
        labels: Labels = (),
        special: Iterable[int] = (),
    ) -> None:
        parts = anatomy(model)
        self.traits = parts.traits()
        self.special = tuple(sorted({*special, *parts.special}))
        self.batches, self.labels = len(batches), labels
        self._model, self._batches, self._marks, self._watcher = model, batches, marks, watcher
        self.begin("reading", self.batches)

    def begin(self, what: str, steps: int) -> None:
        """Something of so many steps begins."""
        if self._watcher is not None:
            self._watcher.begin(what, steps)

    def advance(self) -> None:
        """A step is done."""
        if self._watcher is not None:
            self._watcher.advance()

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        """Layout and signals of each batch."""
        parts = anatomy(self._model)
        for batch in self._batches:
            with torch.no_grad(), attach(self._model, _Reader(signals)) as session:
                session.retain()
                parts.multimodal(**batch)  # without the head, which would make logits of answers, too
                assert session.read is not None
                read = session.read
            self.advance()
            yield read

    def weight(self, layer: int, name: Literal["query", "key"]) -> Tensor:
        """Weight ``[out, D]`` of a layer's query or key projection."""
        weight: Tensor = anatomy(self._model).projection(layer, name).weight.detach()
        if weight.is_meta:
            raise FoveateError(
                f"decoder layer {layer}: its weights are offloaded; calibrate on a model loaded without offloading"
            )
        return weight

    @torch.no_grad()
    def logits(self, recipe: Recipe, without_head: int | None = None) -> Tensor:
        """Last prompt token's logits ``[S, V]`` under ``recipe``; prompts are padded on the left or not at all.

        Raises:
            FoveateError: if ``without_head`` is not None and heads cannot be taken out of the model.
        """
        found = []
        with self._silenced(without_head), attach(self._model, recipe):
            for batch in self._batches:
                found.append(self._model(**batch, logits_to_keep=1).logits[:, -1].float())
                self.advance()
        return torch.cat(found)

    @torch.no_grad()
    def answers(self, recipe: Recipe) -> Iterator[Tensor]:
        """Logits ``[T, V]`` of each batch's rows that predict a label, under ``recipe``; without labels of the last rows."""
        parts = anatomy(self._model)
        head = function(parts, Function("head"))
        with attach(self._model, recipe):
            for batch in self._batches:
                # Without the head, which would make logits of every row.
                hidden = parts.multimodal(**batch).last_hidden_state
                labels = batch.get("labels")
                rows = hidden[:, -1] if labels is None else hidden[:, :-1][labels[:, 1:] != -100]
                self.advance()
                yield head(rows)

    @contextmanager
    def _silenced(self, head: int | None) -> Iterator[None]:
        """What the head makes in each decoder layer is zero meanwhile; None: nothing is."""

        def silence(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            made = args[0].unflatten(-1, (self.traits.heads, -1)).clone()
            made[..., head, :] = 0
            return made.flatten(-2), *args[1:]

        parts = anatomy(self._model)
        layers = [layer for layer in range(self.traits.decoder_layers) if head is not None and layer not in parts.recurrent]
        hooks = [parts.output(layer).register_forward_pre_hook(silence) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def cells(self) -> Iterator[tuple[Tensor, Tensor, Layout]]:
        """Cells ``[I, N, P]`` of each batch's pictures, which of them show what is marked ``[I, N]``, and their layout.

        Raises:
            FoveateError: if nothing says what is marked, or the model opens no site in front of its encoder.
        """
        if len(self._marks) != self.batches:
            raise FoveateError("calibration: needs pictures of which is known where they show what counts (evidence)")
        self.begin("looking at what is marked", self.batches)
        # A mark goes the way of its picture, so wherever that was cropped or resized to, the two still fit. How white a cell
        # is shows in any of its channels.
        pixels = math.prod(self.traits.cell or ()) // (self.traits.cell or (1,))[0]
        white = [x[..., :pixels].float().amax(-1).cpu() for x, _ in map(self._cells, self._marks)]
        middle = (min(map(torch.min, white)) + max(map(torch.max, white))) / 2
        self.begin("looking at pictures", self.batches)
        for batch, lightest in zip(self._batches, white, strict=True):
            x, layout = self._cells(batch)
            yield x.float().cpu(), (lightest > middle) & layout.valid.cpu(), layout.to("cpu")

    @torch.no_grad()
    def _cells(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Layout]:
        reader = _CellReader()
        with attach(self._model, reader) as session:
            session.encode(**batch)
        self.advance()
        (taken,) = reader.taken
        return taken


def calibrate(
    method: Method | str,
    model: nn.Module,
    batches: Batches,
    *,
    marks: Batches = (),
    labels: Labels = (),
    watcher: Watcher | None = None,
    special: Iterable[int] = (),
) -> Artifact:
    """The artifact of ``method``, such as ``"alvts(steps=500)"``, for ``model``; all else as in `Calibration`.

    Raises:
        FoveateError: if the method is unknown, has nothing to calibrate or nothing to do in this model, if it compares kinds
            of prompts and ``labels`` do not say which are which, or if the model's weights cannot be read.
    """
    method = to_calibrate(method)
    if method.labels:
        refuse_labels(method, [label for batch in labels for label in batch])
    if method.labels and len(labels) != len(batches):
        raise FoveateError(f"labels: must be a list for each of the {len(batches)} batches, and there are {len(labels)}")
    traits = anatomy(model).traits()
    check_idle(method, traits)
    fingerprint = traits.fingerprint
    if not any(fingerprint.weights.values()):
        raise FoveateError("model: all of its weights are offloaded; calibrate on a model loaded without offloading")
    return method.artifact(fingerprint, method.calibrate(Calibration(model, batches, marks, watcher, labels, special)))


def refuse_labels(method: Offline, labels: Sequence[str]) -> None:
    """Refuse ``labels`` of samples that are none of the method's kinds, or that leave one out.

    Raises:
        FoveateError: if they do.
    """
    kinds = " or ".join(map(repr, method.labels))
    other = next((label for label in labels if label not in method.labels), None)
    if other is not None:
        raise FoveateError(f"{method.name}: a sample's label (its answer) is {other!r}; must be {kinds}")
    missing = [kind for kind in method.labels if kind not in labels]
    if missing:
        raise FoveateError(
            f"{method.name}: no sample has the label (the answer) {missing[0]!r}; give prompts of each kind, {kinds}"
        )


def to_calibrate(method: Method | str) -> Offline:
    """The one method that ``method`` says.

    Raises:
        FoveateError: if there is none or several, or nothing to calibrate.
    """
    methods = Recipe.of(method).methods
    if len(methods) != 1:
        raise FoveateError(f"calibrate {str(method)!r}: must be one method, such as 'shortv' or 'alvts(steps=500)'")
    if isinstance(methods[0], Weights):
        raise FoveateError(f'{methods[0].name}: replaces weights; run `foveate quantize "{methods[0]}"` instead')
    if not isinstance(methods[0], Offline):
        raise FoveateError(f"{methods[0].name}: has nothing to calibrate; it runs on any model that it supports as it is")
    return methods[0]
