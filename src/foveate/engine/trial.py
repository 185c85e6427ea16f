"""A block on trial: what a method that replaces weights is handed (`foveate.core.weights.Block`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import FoveateError
from foveate.core.roles import Role
from foveate.core.weights import Replaced, Rows, Stand, Stream
from foveate.engine.linears import dense, linears_of
from foveate.engine.replay import HOST, Replay, StoppedError, first, stopping
from foveate.engine.sides import Present, saying
from foveate.engine.slopes import Slopes


class Trial:
    """Block ``number`` of a replay, as a copy on which things are tried.

    Args:
        replay: what brings the blocks.
        number: of the block.
        states: what enters it of each batch, by stream.
        slopes: gradients of the whole model, for who asks.
        say: told what went otherwise than usual.
    """

    def __init__(
        self,
        replay: Replay,
        number: int,
        states: Mapping[Stream, Sequence[Tensor]],
        slopes: Slopes,
        say: Callable[[str], None],
    ) -> None:
        self.number, self.say = number, say
        self.module = replay.copy(number)
        self.linears = linears_of(self.module, f"{replay.part} block {number}")
        self.dtype = next(iter(self.linears.values())).weight.dtype
        self._replay, self._states, self._slopes = replay, states, slopes
        self.groups = self._groups() if replay.batches else tuple((name,) for name in self.linears)
        self.placed: dict[str, Replaced] = {}
        self._standing: dict[str, Stand] = {}

    def weight(self, name: str) -> Tensor:
        """``[out, in]`` of a linear, float32."""
        return self.linears[name].weight.detach().float()

    def exact(self, name: str) -> Iterator[Rows]:
        """Of each batch what the unmodified model feeds a linear."""
        return self._rows(name, "exact")

    def reached(self, name: str) -> Iterator[Rows]:
        """The same with all that has been placed so far."""
        return self._rows(name, "reached")

    @torch.no_grad()
    def feeder(self, name: str) -> str | None:
        """The linear whose output channels are, one for one and times something, the inputs of this one."""
        parent, width = name.rpartition(".")[0], self.linears[name].in_features
        if not self._replay.batches:
            return None
        plain = self._input(name, "exact", 0)
        # Powers of two change no rounding, so the inputs are those to the last bit, if they are.
        scale = 2.0 ** torch.randint(-1, 2, (width,), generator=torch.Generator().manual_seed(0))
        scale = scale.to(plain.device, plain.dtype)
        for other, linear in self.linears.items():
            if other != name and other.rpartition(".")[0] == parent and linear.out_features == width:
                with standing(self.module, {other: _scaled(linear, scale)}):
                    if torch.allclose(self._input(name, "exact", 0), plain * scale, rtol=1e-3, atol=1e-6):
                        return other
        return None

    @torch.no_grad()
    def source(self, name: str) -> str | None:
        """What a linear's input could be divided in: the norm whose output it is, or its `feeder`; None: nothing."""
        made: list[tuple[str, Any]] = []

        def note(norm: str) -> Callable[[nn.Module, Any, Any], None]:
            return lambda module, args, output: made.append((norm, output))

        norms = {norm: part for norm, part in self.module.named_modules() if "Norm" in type(part).__name__}
        handles = [part.register_forward_hook(note(norm)) for norm, part in norms.items()]
        try:
            x = self._input(name, "exact", 0)
        finally:
            for handle in handles:
                handle.remove()
        return next((norm for norm, output in made if output is x), None) or self.feeder(name)

    def inspect(self, names: Sequence[str], stream: Stream = "exact") -> Iterator[Part]:
        """Of each batch the smallest part of the block that is fed by what these linears share."""
        where = _common(names)
        for batch in range(len(self._replay.batches)):
            yield self._part(names, where, stream, batch)

    def slopes(self, name: str) -> Sequence[Sequence[Rows]]:
        """For each block and batch the mean size ``[n, 1]`` of the gradient at the output of a linear of this name."""
        return self._slopes.of(name)

    def pull(self, batch: int, made: Tensor, temperature: float = 1.0) -> Tensor:
        """The gradient at ``made``, were it what the block puts out for a batch, of how far the model's answers move."""
        return self._slopes.pull(self.number, batch, made, temperature)

    def place(self, name: str, replaced: Replaced) -> None:
        """From here on ``replaced`` stands for a linear."""
        linear = self.linears[name]
        if tuple(replaced.integers.shape) != tuple(linear.weight.shape):
            raise FoveateError(
                f"{name}: integers of shape {tuple(replaced.integers.shape)} cannot stand for a weight of shape "
                f"{tuple(linear.weight.shape)}"
            )
        self.placed[name] = replaced
        self._standing[name] = dense(replaced, linear)

    @torch.no_grad()
    def forward(self, stream: Stream) -> list[Tensor]:
        """What the next block gets of each batch."""
        found = []
        with standing(self.module, self._stands(stream)):
            for batch, x in enumerate(self._states[stream]):
                with self._saying(batch):
                    found.append(self._replay.run(self.module, self.number, batch, x).to(HOST))
        return found

    def _stands(self, stream: Stream) -> dict[str, Stand]:
        return {} if stream == "exact" else self._standing

    def _run(self, batch: int, x: Tensor) -> Tensor:
        with self._saying(batch):
            return self._replay.run(self.module, self.number, batch, x, whole=False)

    def _saying(self, batch: int) -> AbstractContextManager[None]:
        """The rows of a batch run meanwhile."""
        return saying(Present(self._replay.batches[batch].role.to(next(self.module.parameters()).device)))

    def _input(self, name: str, stream: Stream, batch: int) -> Tensor:
        """What enters a linear; the forward ends there."""
        found: list[Tensor] = []

        def catch(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found.append(args[0])
            raise StoppedError

        handle = self.linears[name].register_forward_pre_hook(catch)
        try:
            with stopping():
                self._run(batch, self._states[stream][batch])
        finally:
            handle.remove()
        if not found:
            raise FoveateError(f"{name}: does not run in block {self.number}; use a method that leaves it alone")
        return found[0]

    @torch.no_grad()
    def _rows(self, name: str, stream: Stream) -> Iterator[Rows]:
        for batch, watched in enumerate(self._replay.batches):
            with torch.no_grad(), standing(self.module, self._stands(stream)):
                x = self._input(name, stream, batch)
            kept = (watched.role != int(Role.PAD)).flatten().to(x.device)
            role, sample = (rows.flatten().to(x.device)[kept] for rows in (watched.role, watched.sample))
            yield Rows(x.reshape(-1, x.shape[-1])[kept], role, sample)

    @torch.no_grad()
    def _groups(self) -> tuple[tuple[str, ...], ...]:
        """Linears that are called with the very same tensor share their input."""
        calls: list[tuple[str, Tensor]] = []

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda module, args: calls.append((name, args[0]))

        handles = [linear.register_forward_pre_hook(note(name)) for name, linear in self.linears.items()]
        try:
            self._run(0, self._states["exact"][0])
        finally:
            for handle in handles:
                handle.remove()
        groups: dict[int, list[str]] = {}
        for name, x in calls:  # which keep their tensors alive, so that no number comes twice
            groups.setdefault(id(x), []).append(name)
        return tuple(map(tuple, groups.values()))

    @torch.no_grad()
    def _part(self, names: Sequence[str], where: str, stream: Stream, batch: int) -> Part:
        """What surrounds the linears, and what it is called with; the linears side by side, where nothing does."""
        role = self._replay.batches[batch].role
        with standing(self.module, self._stands(stream)):
            if not where:
                x = self._states[stream][batch].to(next(self.module.parameters()).device)
                return Part(x, role, tuple(self.linears), self.module, lambda given: self._run(batch, given))
            called: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
            module = self.module.get_submodule(where)
            note = lambda _, args, kwargs: called.append((args, kwargs))  # noqa: E731
            handle = module.register_forward_pre_hook(note, with_kwargs=True)
            try:
                x = self._input(names[0], stream, batch)
            finally:
                handle.remove()
        args, kwargs = called[0]
        if any(value is x for value in (*args, *kwargs.values())):

            def around(given: Tensor) -> Tensor:
                swapped = tuple(given if value is x else value for value in args)
                return first(module(*swapped, **{key: given if value is x else value for key, value in kwargs.items()}))

            inside = tuple(name for name in self.linears if f"{name}.".startswith(f"{where}."))
            return Part(x, role, inside, self.module, around)
        beside = [self.linears[name] for name in names]
        return Part(
            x, role, tuple(names), self.module, lambda given: torch.cat([linear(given) for linear in beside], dim=-1)
        )


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a block on one batch (`foveate.core.weights.Inspected`)."""

    x: Tensor
    role: Tensor
    linears: tuple[str, ...]
    _block: nn.Module = field(repr=False)
    _around: Callable[[Tensor], Tensor] = field(repr=False)

    def run(self, x: Tensor, stands: Mapping[str, Stand] | None = None) -> Tensor:
        """``[B, T, D']`` what it makes of ``x`` ``[B, T, D]``, with other linears for those named."""
        products = {name: _biased(stand, self._block.get_submodule(name)) for name, stand in (stands or {}).items()}
        with standing(self._block, products), saying(Present(self.role.to(x.device))):
            return self._around(x)


@contextmanager
def standing(block: nn.Module, stands: Mapping[str, Stand]) -> Iterator[None]:
    """Linears of a block's copy stand back meanwhile; whatever stood for others of them does not."""
    linears = [block.get_submodule(name) for name in stands]
    before = [linear.__dict__.get("forward") for linear in linears]
    for linear, stand in zip(linears, stands.values(), strict=True):
        linear.__dict__["forward"] = stand
    try:
        yield
    finally:
        for linear, own in zip(linears, before, strict=True):
            linear.__dict__.pop("forward")
            if own is not None:
                linear.__dict__["forward"] = own


def _biased(stand: Stand, linear: nn.Module) -> Stand:
    bias = linear.bias
    return (lambda x: stand(x) + bias) if isinstance(bias, Tensor) else stand


def _scaled(linear: nn.Linear, scale: Tensor) -> Stand:
    return lambda x: functional.linear(x, linear.weight, linear.bias) * scale


def _common(names: Sequence[str]) -> str:
    """The smallest part that has all of these linears; the linear itself, if it is one, and the block for none."""
    paths = [name.split(".") for name in names]
    shared = []
    for steps in zip(*paths, strict=False):
        if len(set(steps)) > 1:
            break
        shared.append(steps[0])
    return ".".join(shared)
