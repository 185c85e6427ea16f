"""Devices that this machine does not have.

Tensors that carry a device's name, keep their numbers on the CPU, and refuse to meet those of another device as tensors on
two GPUs would. `FakeTensorMode` with fake ``cuda`` devices would need a build with CUDA, and stops where an answer depends
on numbers.

They also tell where the host would wait for a device: where it reads what was computed there, and where it copies ordinary
memory to it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from tests.leaves import mapped, tensors

KIND = "lazy"
"""A device type that every build of torch knows how to index on, and nothing else uses."""
CPU = torch.device("cpu")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
READS = {
    aten._local_scalar_dense.default,
    aten.bincount.default,
    aten._coalesce.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.nonzero.default,
    aten.unique_consecutive.default,
    aten.unique_dim.default,
    aten._unique2.default,
}
"""Operators whose result, or the size of it, the host has to read."""
OWN = str(Path(foveate.__file__).parent)


@dataclass(frozen=True)
class Wait:
    """The host waits for a device.

    Attributes:
        operator: what it calls.
        stack: from where, the innermost line of the library first (of any code, if there is none of the library's).
    """

    operator: str
    stack: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator} at {' < '.join(self.stack)}"


def device(number: int) -> torch.device:
    """One of the pretended devices."""
    return torch.device(KIND, number)


class Elsewhere(Tensor):
    """A tensor on a pretended device."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, where: torch.device) -> Elsewhere:
        made = Tensor._make_wrapper_subclass(cls, held.shape, strides=held.stride(), dtype=held.dtype, device=where)  # type: ignore[attr-defined]
        made.held = held
        return made

    def tolist(self) -> Any:
        Pretended.wait("tolist")
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is on, tensors can be made on and moved to pretended devices.

    Attributes:
        waits: how often the host waited so far, and where.
    """

    _on: ClassVar[list[Pretended]] = []

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[Wait] = []

    @classmethod
    def wait(cls, operator: str) -> None:
        """The host waits."""
        if cls._on:
            cls.current().waits.append(Wait(operator, tuple(_stack())))

    @classmethod
    def current(cls) -> Pretended:
        """The one that is on."""
        return cls._on[-1]

    def __enter__(self) -> Pretended:
        self._on.append(self)
        self._patch = patch("torch.tensor", _tensor)  # which no mode is asked about
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patch.stop()
        self._on.remove(self)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **options: Any) -> Tensor:
    made = make(mapped(Elsewhere, lambda tensor: tensor.held, data), **options)
    return made if device is None else made.to(device)


def _stack(depth: int = 6) -> Iterator[str]:
    """The innermost lines that led here: the library's own where there are any."""
    frames, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename != __file__ and "/torch/" not in frame.f_code.co_filename:
            frames.append(frame)
        frame = frame.f_back
    own = [frame for frame in frames if frame.f_code.co_filename.startswith(OWN)]
    for frame in (own or frames)[:depth]:
        place = "/".join(frame.f_code.co_filename.split("/")[-2:])
        yield f"{place}:{frame.f_lineno} {frame.f_code.co_name}"


def _waits(function: Any, args: Any, kwargs: dict[str, Any], where: torch.device) -> bool:
    """Whether the host waits for a device in this call, whose result is on ``where``."""
    if function in MOVES:
        plain = function is aten._to_copy.default
        source = args[0] if plain else args[1]
        if source.device.type == where.type or not source.numel():
            return False
        # What may take its time is staged on its way to a device; the way back is waited for.
        unhurried = kwargs.get("non_blocking", False) or (not plain and args[2:] == (True,))
        return source.device.type == KIND or not unhurried
    if not any(leaf.device.type == KIND for leaf in tensors((args, kwargs))):
        return False
    if function is aten.repeat_interleave.Tensor:
        return kwargs.get("output_size") is None
    if function not in INDEXED:
        return function in READS
    index = [i for i in args[1] if i is not None]
    masks = [i.dtype in (torch.bool, torch.uint8) for i in index]
    if len(args) > 2 and all(masks) and args[2].numel() == 1:
        return False  # filled in under the mask
    return any(masks) or any(i.device == CPU and i.ndim > 0 for i in index)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    found = list(tensors((args, kwargs)))
    meeting = found
    if function in INDEXED and args[0].device != CPU:  # an index may lie on the CPU
        meeting = [args[0], *(i for i in args[1] if i is not None and i.device != CPU), *args[2:3]]
    # As may a single number.
    devices = {tensor.device for tensor in meeting if tensor.ndim or tensor.device != CPU}
    if len(devices) > 1 and function not in MOVES:
        raise RuntimeError(f"{function}: tensors on {', '.join(sorted(map(str, devices)))}")
    asked = kwargs.get("device")
    if asked is not None:
        where = torch.device(asked)
    elif function in MOVES:
        where = args[0].device
    else:
        where = next(iter(devices), CPU)
    if _waits(function, args, kwargs, where):
        Pretended.wait(str(function))
    args, kwargs = mapped(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    out = function(*args, **mapped(torch.device, lambda _: CPU, kwargs))

    def named(tensor: Tensor) -> Tensor:
        for given in found:  # what an operator writes to stays the same object
            if tensor is (given.held if isinstance(given, Elsewhere) else given):
                return given
        return Elsewhere(tensor, where) if where.type == KIND else tensor

    return mapped(Tensor, named, out)
