"""Runs the blocks of a decoder or an encoder one by one on what calibration samples brought there, without the model around.

The model runs once over each batch while its blocks are watched: what enters the first of them, what else each is called
with, and what the model adds to the output of one before the next gets it (DeepStack). From then on ``h = block(h, ...)``
gives what the model itself gives, to the last bit: that is checked on the first batch before anybody relies on it. A block
runs as a copy on the device that it is to run on, so that the model stays as it is, and one block is all that has to fit
there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache

from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.roles import Role
from foveate.engine.before import Attaching
from foveate.engine.calibrate import Batches, Calibration
from foveate.engine.linears import blocks_of
from foveate.engine.stand_in import stand_in
from foveate.models.anatomy import Anatomy

HOST = torch.device("cpu")


@dataclass
class Watched:
    """One batch: what its blocks are called with.

    Attributes:
        x: ``[B, T, D]`` (``[P, D]`` in packed encoders) what enters the first block, on the host.
        out: what the last block made of it, on the host; let go once it was compared.
        calls: the other arguments of each block.
        added: what the model adds to the output of each block before the next one gets it; None = nothing.
        role: of the rows of ``x``, all but its last dimension.
        sample: which sample each row is of, in the same shape.
    """

    x: Tensor
    out: Tensor | None = None
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    added: list[Tensor | None] = field(default_factory=list)
    role: Tensor = field(default_factory=lambda: torch.empty(0))
    sample: Tensor = field(default_factory=lambda: torch.empty(0))


class Replay:
    """What all batches bring to the blocks of a ``part`` of a model.

    Args:
        parts: the model, taken apart.
        batches: keyword arguments of its forward; with ``labels`` where answers stand behind the prompts.
        part: whose blocks are meant.
        device: where blocks are to run; None: where they are.
        advance: called after each batch.
        attaching: puts what acts before the language model to work, for the forward that is watched; None: nothing does.

    Attributes:
        blocks: the model's own, untouched.
        batches: what they are called with.

    Raises:
        FoveateError: if blocks on their own do not give what the model gives.
    """

    def __init__(
        self,
        parts: Anatomy,
        batches: Batches,
        part: Literal["decoder", "encoder"] = "decoder",
        device: torch.device | None = None,
        advance: Callable[[], None] = lambda: None,
        attaching: Attaching | None = None,
    ) -> None:
        self.parts, self.part = parts, part
        self.blocks = blocks_of(parts, part)
        self._device, self.attaching = device, attaching
        self.batches: list[Watched] = []
        for batch in batches:
            self.batches.append(self._watch(batch))
            advance()
        self._compare()

    def copy(self, number: int) -> nn.Module:
        """A copy of a block, on the device where it is to run, that may be changed."""
        block = copy.deepcopy(self.blocks[number]).eval().requires_grad_(False)
        return block if self._device is None else block.to(self._device)

    def run(self, block: nn.Module, number: int, batch: int, x: Tensor, whole: bool = True) -> Tensor:
        """What block ``number``, as the copy ``block``, makes of ``x`` of a batch; ``whole``: with what the model adds."""
        watched, device = self.batches[batch], next(block.parameters()).device
        args, kwargs = self.called_with(number, batch, device)
        made = first(block(x.to(device), *args, **kwargs))
        added = watched.added[number] if whole else None
        return made if added is None else made + added.to(device)

    def called_with(self, number: int, batch: int, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What else a block is called with for a batch."""
        args, kwargs = self.batches[batch].calls[number]
        return _moved(args, device), _moved(kwargs, device)

    @torch.no_grad()
    def _watch(self, batch: Mapping[str, Tensor]) -> Watched:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        seen = _Seen(len(self.blocks))
        training = {module: module.training for module in self.parts.model.modules()}
        layout: Layout | None = None
        with ExitStack() as stack:
            # In front of a session's own, so that what is seen is what it calls blocks with.
            for number, block in enumerate(self.blocks):
                stack.callback(stand_in(block, "forward", seen.through, number))
            try:
                self.parts.model.eval()
                if self.attaching is None:
                    self.parts.multimodal(**inputs, **({"use_cache": False} if self.part == "decoder" else {}))
                else:
                    session = stack.enter_context(self.attaching())
                    session.retain()
                    self.parts.multimodal(**batch, use_cache=False)
                    layout = session.read[0] if session.read is not None else None
            finally:
                for module, mode in training.items():
                    module.training = mode
        watched = seen.watched
        if watched is None or len(watched.calls) != len(self.blocks):
            raise FoveateError(f"batches: one does not run all blocks of the {self.part} once; give each batch pictures")
        self._say_roles(watched, batch, layout)
        return watched

    def _say_roles(self, watched: Watched, batch: Mapping[str, Tensor], layout: Layout | None) -> None:
        shape = watched.x.shape[:-1]
        if self.part == "decoder":
            if layout is None:
                ((layout, _),) = Calibration(self.parts.model, [batch]).read()
            watched.role = layout.role.to(HOST)
        else:
            watched.role = torch.full(shape, int(Role.IMAGE))
            encoder = self.parts.encoder
            if encoder is not None and encoder.prefix:
                watched.role[..., : encoder.prefix] = int(Role.CLS)
        # Of packed encoders nobody says which row is of which picture.
        first_of = torch.arange(shape[0])[:, None] if len(shape) > 1 else torch.zeros(1, dtype=torch.long)
        watched.sample = first_of.expand(shape)

    @torch.no_grad()
    def _compare(self) -> None:
        """Blocks on their own give what the model gives."""
        for number, watched in enumerate(self.batches):
            x = watched.x
            for block, _ in enumerate(self.blocks if number == 0 else ()):
                x = self.run(self.copy(block), block, number, x).to(HOST)
            out, watched.out = watched.out, None
            if number == 0 and self._device is None and (out is None or not torch.equal(x, out)):
                raise FoveateError(
                    f"{self.parts.family}: the blocks of its {self.part} on their own do not give what the model gives, so "
                    "it cannot be quantized block by block; use another family"
                )


class _Seen:
    """What is seen of the blocks in one forward."""

    def __init__(self, blocks: int) -> None:
        self.watched: Watched | None = None
        self._blocks = blocks
        self._kept: dict[int, tuple[Any, Any]] = {}
        self._out: Tensor | None = None

    def through(self, number: int, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a block, noting what comes and goes."""
        given = dict(kwargs)
        x = args[0] if args else given.pop("hidden_states")
        if number == 0:
            self.watched = Watched(x.detach().to(HOST, copy=True))
        elif self.watched is not None and self._out is not None:
            same = x is self._out or torch.equal(x, self._out)
            self.watched.added.append(None if same else (x - self._out).to(HOST))
        if self.watched is not None:
            self.watched.calls.append((self._keep(args[1:]), self._keep(given)))
        output = original(*args, **kwargs)
        self._out = first(output).detach()
        if number == self._blocks - 1 and self.watched is not None:
            self.watched.added.append(None)
            self.watched.out = self._out.to(HOST, copy=True)
        return output

    def _keep(self, value: Any) -> Any:
        """On the host, without a cache; what several blocks are given is kept once."""
        if isinstance(value, Cache):
            return None
        if isinstance(value, Tensor):
            if id(value) not in self._kept:
                self._kept[id(value)] = value, value.detach().to(HOST)
            return self._kept[id(value)][1]
        if isinstance(value, dict):
            return {name: self._keep(one) for name, one in value.items()}
        if isinstance(value, tuple | list):
            return type(value)(map(self._keep, value))
        return value


def first(output: Any) -> Tensor:
    """The hidden states that a block or a part of one gives."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(one, device) for name, one in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_moved(one, device) for one in value)
    return value


class StoppedError(Exception):
    """Ends a forward that has seen what it was run for."""


@contextmanager
def stopping() -> Iterator[None]:
    """A forward that may be ended by `StoppedError`."""
    with suppress(StoppedError):
        yield
