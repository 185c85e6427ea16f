"""Devices that this machine does not have.

Tensors that carry a device's name, keep their numbers on the CPU, and refuse to meet those of another device as tensors on
two GPUs would. `FakeTensorMode` with fake ``cuda`` devices would need a build with CUDA, and stops where an answer depends
on numbers.
"""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

KIND = "lazy"
"""A device type that every build of torch knows how to index on, and nothing else uses."""
CPU = torch.device("cpu")
aten = torch.ops.aten
MOVES = {aten._to_copy.default, aten.copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}


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
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


class Pretended(TorchDispatchMode):
    """While it is on, tensors can be made on and moved to pretended devices."""

    def __enter__(self) -> Pretended:
        self._patch = patch("torch.tensor", _tensor)  # which no mode is asked about
        self._patch.start()
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._patch.stop()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(function, args, kwargs or {})


def _tensor(data: Any, *, device: Any = None, make: Any = torch.tensor, **options: Any) -> Tensor:
    made = make(tree_map_only(Elsewhere, lambda tensor: tensor.held, data), **options)
    return made if device is None else made.to(device)


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    meeting = tensors
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
    args, kwargs = tree_map_only(Elsewhere, lambda tensor: tensor.held, (args, kwargs))
    out = function(*args, **tree_map_only(torch.device, lambda _: CPU, kwargs))

    def named(tensor: Tensor) -> Tensor:
        for given in tensors:  # what an operator writes to stays the same object
            if tensor is (given.held if isinstance(given, Elsewhere) else given):
                return given
        return Elsewhere(tensor, where) if where.type == KIND else tensor

    return tree_map_only(Tensor, named, out)
