"""The linears of a block that may be replaced, what stands for one without any packing, and how that lies on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from foveate.core.errors import FoveateError
from foveate.core.weights import Replaced, Sparse, Stand, Steps
from foveate.engine.sides import moved_sides, product, sides_of, tensors_of_sides
from foveate.models import Anatomy
from foveate.ops.grid import Grid, limits, packed, unpacked

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SAMPLED = 4096
"""Entries of each linear by which `digest` tells weights apart."""


def blocks_of(parts: Anatomy, part: Literal["decoder", "encoder"]) -> Sequence[nn.Module]:
    """The decoder layers, or the blocks of the vision encoder.

    Raises:
        FoveateError: if the encoder cannot be read.
    """
    if part == "decoder":
        return parts.layers
    if parts.encoder is None:
        raise FoveateError(f"{parts.family}: nothing in its encoder can be read; use a method for the language model")
    return parts.encoder.blocks


def numbered(blocks: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Blocks by number."""
    return {str(number): block for number, block in enumerate(blocks)}


def linears_of(block: nn.Module, where: str) -> dict[str, nn.Linear]:
    """Its linears by name, in their order.

    Raises:
        FoveateError: if some cannot be read, or it holds weights that are no linears: experts, adapters, quantized ones.
    """
    found: dict[str, nn.Linear] = {}
    for name, module in block.named_modules():
        if hasattr(module, "base_layer"):
            raise FoveateError(f"{where}: {name} has an adapter; merge it first (model.merge_and_unload())")
        if type(module) is nn.Linear:
            refuse_unreadable(module, f"{where}: {name}")
            found[name] = module
        elif hasattr(module, "in_features") and not isinstance(module, nn.Bilinear):
            raise FoveateError(
                f"{where}: {name} is a {type(module).__name__}, quantized already or of a kind of its own; load the "
                "checkpoint of which it was made, with plain linears"
            )
    for name, parameter in block.named_parameters():
        if parameter.ndim == 3 and "expert" in name:
            raise FoveateError(
                f"{where}: {name} holds experts in one tensor, which is not quantized; use a dense model, without experts"
            )
    if not found:
        raise FoveateError(f"{where}: has no linears that could be quantized")
    return found


def _readable(weight: Tensor) -> bool:
    return type(weight) is nn.Parameter and weight.dtype in FLOATS and not weight.is_meta and not _gone(weight)


def _gone(weight: Tensor) -> bool:
    """Whether a session was committed: entries share one place."""
    return weight.untyped_storage().nbytes() < weight.nbytes


def refuse_absent(linear: nn.Linear, where: str) -> None:
    """Refuse a linear whose weight is not there: offloaded, or given up.

    Raises:
        FoveateError: with the remedy.
    """
    weight = linear.weight
    if weight.is_meta:
        raise FoveateError(f"{where} is offloaded; load the model without offloading")
    if type(weight) is nn.Parameter and _gone(weight):
        raise FoveateError(f"{where} was given up by session.commit(); load the model again")


def refuse_unreadable(linear: nn.Linear, where: str) -> None:
    """Refuse a linear that is offloaded, given up or quantized already.

    Raises:
        FoveateError: with the remedy.
    """
    refuse_absent(linear, where)
    if not _readable(linear.weight):
        dtype = linear.weight.dtype
        raise FoveateError(f"{where} is quantized already ({dtype}); load the checkpoint of which it was made")


def digest(block: nn.Module) -> str | None:
    """What a block's weights are, to the bit: of `SAMPLED` entries of each linear; None where they cannot be read."""
    found = hashlib.sha256()
    for linear in (part for part in block.modules() if type(part) is nn.Linear):
        if not _readable(linear.weight):
            return None
        flat = linear.weight.detach().flatten()
        found.update(flat[:: max(1, len(flat) // SAMPLED)].float().cpu().numpy().tobytes())
    return found.hexdigest()[:16]


def values(replaced: Replaced, dtype: torch.dtype) -> Tensor:
    """``[out, in]`` the weight that stands for a linear's, without what its input is divided by."""
    weight = replaced.grid.values(replaced.integers).to(dtype)
    return weight if replaced.sparse is None else replaced.sparse.added(weight)


def dense(replaced: Replaced, linear: nn.Linear) -> Stand:
    """What stands for ``linear``, its weight spelled out; roles, if it asks for them, are what somebody is `saying`."""
    bias = linear.bias
    here = moved(replaced, linear.weight.device, linear.weight.dtype)
    weight = values(here, linear.weight.dtype)
    return lambda x: product(here, x, lambda fed: functional.linear(fed, weight, bias))


def moved(replaced: Replaced, device: torch.device, dtype: torch.dtype | None = None) -> Replaced:
    """The same on ``device``, its sides in ``dtype`` if that is given."""
    grid, sparse, inputs = replaced.grid, replaced.sparse, replaced.inputs
    sides, by_role = moved_sides(replaced, device, dtype)
    return replace(
        replaced,
        grid=_moved(grid, device),
        integers=replaced.integers.to(device),
        divide=None if replaced.divide is None else replaced.divide.to(device),
        sparse=sparse and Sparse(*(part.to(device) for part in parts_of(sparse)), sparse.bits),
        sides=sides,
        by_role=by_role,
        inputs=None if inputs is None else _moved(inputs, device),
    )


def parts_of(sparse: Sparse) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its tensors, in their order."""
    return sparse.counts, sparse.index, sparse.integers, sparse.scale


def _moved(grid: Steps, device: torch.device) -> Grid:
    return Grid(grid.bits, grid.scale.to(device), None if grid.zero is None else grid.zero.to(device))


def tensors_of(replaced: Replaced, dtype: torch.dtype) -> dict[str, Tensor]:
    """As it lies on disk: integers packed, steps in the ``dtype`` of the model where that holds them exactly."""
    grid, sparse = replaced.grid, replaced.sparse
    lowest = limits(grid.bits, grid.zero is None)[0]
    levels = replaced.integers.to(torch.int16) - lowest
    found = {
        "form": torch.tensor([grid.bits, levels.shape[1], int(grid.zero is None), replaced.activations]),
        "words": packed(levels, grid.bits),
        "scale": _small(grid.scale, dtype),
    }
    if grid.zero is not None:
        found["zero"] = grid.zero.to(torch.uint8)
    if replaced.divide is not None:
        found["divide"] = _small(replaced.divide, dtype)
    if sparse is not None:
        levels = sparse.integers.to(torch.int16) - limits(sparse.bits, True)[0]
        found |= {
            "sparse_form": torch.tensor([sparse.bits], dtype=torch.uint8),
            "sparse_counts": sparse.counts,
            "sparse_index": sparse.index,
            "sparse_words": packed(levels, sparse.bits),
            "sparse_scale": _small(sparse.scale, dtype),
        }
    sides = tensors_of_sides(replaced)
    found |= {name: _small(part, dtype) if part.is_floating_point() else part for name, part in sides.items()}
    if replaced.inputs is not None:
        assert replaced.inputs.zero is not None, "inputs have a zero point"
        found["inputs"] = torch.cat([replaced.inputs.scale.flatten(), replaced.inputs.zero.flatten()]).float()
    return {name: tensor.contiguous().cpu() for name, tensor in found.items()}


def read_back(tensors: Mapping[str, Tensor]) -> Replaced:
    """What `tensors_of` wrote."""
    bits, inputs, symmetric, activations = tensors["form"].tolist()
    levels = unpacked(tensors["words"], bits, inputs)
    scale, zero = tensors["scale"].float(), tensors.get("zero")
    integers = (levels.to(torch.int16) + limits(bits, True)[0]).to(torch.int8) if symmetric else levels
    divide, sparse = tensors.get("divide"), _sparse_of(tensors, inputs)
    grid = Grid(bits, scale, None if zero is None else zero.to(scale.dtype))
    inputs = None
    if "inputs" in tensors:
        step, nought = tensors["inputs"][:, None, None]
        inputs = Grid(activations, step, nought)
    return Replaced(
        grid, integers, None if divide is None else divide.float(), activations, sparse, *sides_of(tensors), inputs
    )


def _sparse_of(tensors: Mapping[str, Tensor], inputs: int) -> Sparse | None:
    if "sparse_form" in tensors:
        (bits,), index = tensors["sparse_form"].tolist(), tensors["sparse_index"]
        levels = unpacked(tensors["sparse_words"], bits, len(index))
        integers = (levels.to(torch.int16) + limits(bits, True)[0]).to(torch.int8)
        return Sparse(tensors["sparse_counts"], index, integers, tensors["sparse_scale"].float(), bits)
    if "index" not in tensors:
        return None
    # As it was written once: every row as wide as the fullest, its rest at -1.
    index = tensors["index"].long()
    full = torch.zeros(len(index), inputs + 1, dtype=torch.int8).scatter_(1, index % (inputs + 1), tensors["sparse"])
    return Sparse.of(full[:, :inputs], tensors["sparse_scale"].float())


def _small(steps: Tensor, dtype: torch.dtype) -> Tensor:
    # Copied: linears may share what their input is divided by, and a file holds each tensor once.
    rounded = steps.to(dtype, copy=True)
    return rounded if torch.equal(rounded.to(steps.dtype), steps) else steps.to(torch.float32, copy=True)
