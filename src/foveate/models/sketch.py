"""A sketch of a model's weights, by which two fine-tunes of one shape are told apart."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

ENTRIES = 4
"""Entries of each parameter."""
START, STEP = 0.1459, 0.2361
"""Share of the parameter before the first, and from each to the next: no plain fractions, which would lie in one column."""
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@torch.no_grad()
def sketch(parts: Mapping[str, nn.Module]) -> dict[str, tuple[float, ...]]:
    """A few entries of each parameter of ``parts``, by name; none where they cannot be read (offloaded, quantized, sharded).

    Nothing is copied or summed but these entries; they come to the host in one transfer from each device.
    """
    named = {f"{prefix}.{name}": p for prefix, part in parts.items() for name, p in part.named_parameters()}
    entries = {name: _entries(parameter) for name, parameter in named.items() if _readable(parameter)}
    found: dict[str, tuple[float, ...]] = dict.fromkeys(named, ())
    for device in {each.device for each in entries.values()}:
        here = {name: each for name, each in entries.items() if each.device == device}
        numbers = iter(torch.cat([each.float() for each in here.values()]).tolist())
        found |= {name: tuple(next(numbers) for _ in each) for name, each in here.items()}
    return found


def _readable(parameter: nn.Parameter) -> bool:
    # Quantized and sharded ones are of types of their own.
    return type(parameter) is nn.Parameter and parameter.dtype in DTYPES and not parameter.is_meta and parameter.numel() > 0


def _entries(parameter: Tensor) -> Tensor:
    start, step = int(START * parameter.numel()), max(int(STEP * parameter.numel()), 1)
    return parameter.detach().reshape(-1)[start::step][:ENTRIES]
