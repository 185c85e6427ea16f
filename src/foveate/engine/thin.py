"""A projector whose linear layers are of low rank: what it makes is nearly the same, and costs less."""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import nn

from foveate.core.errors import FoveateError
from foveate.models.anatomy import Anatomy, Encoder
from foveate.ops.lowrank import factorise

SPARE = 4
"""So many times the rank is asked for, and the best of it taken: weights' singular values fall slowly."""


def check_thin(parts: Anatomy) -> None:
    """Refuse a projector without weights that could be factorised."""
    modules = [] if parts.encoder is None else parts.encoder.projector.modules()
    linears = [module for module in modules if isinstance(module, nn.Linear)]
    if not linears or not all(_readable(module, parts.home) for module in linears):
        raise FoveateError(
            "rank: the projector has no plain linear layers that could be brought to a low rank (quantized, offloaded, or "
            "of another kind); use rank=None"
        )


def thin(encoder: Encoder, rank: int) -> Encoder:
    """The encoder with a copy of its projector in which each linear layer of a larger rank has ``rank``; others are whole.

    Weights are its own, in float32 at least, on the devices of the model's.
    """
    projector = copy.deepcopy(encoder.projector).requires_grad_(False)
    for name, module in [*projector.named_modules()]:
        if isinstance(module, nn.Linear) and rank < min(module.weight.shape):
            parent, _, child = name.rpartition(".")
            narrow = _factors(module, rank)
            if not name:
                projector = narrow
            else:
                setattr(projector.get_submodule(parent), child, narrow)
    wide = next((torch.promote_types(p.dtype, torch.float32) for p in projector.parameters()), torch.float32)
    return replace(encoder, projector=projector.to(wide))


def _readable(module: nn.Linear, home: torch.device) -> bool:
    """Whether its weight is a matrix of numbers, where the model runs."""
    weight = module.weight
    plain = weight.is_floating_point() and weight.shape == (module.out_features, module.in_features)
    return plain and weight.device.type == home.type


def _factors(module: nn.Linear, rank: int) -> nn.Sequential:
    """Two layers in the place of one."""
    left, right = factorise(module.weight.detach()[None], SPARE * rank)
    left, right = left[..., :rank], right[:, :rank]
    down, up = (nn.Linear(*part.shape[:0:-1], bias=False, device="meta") for part in (right, left))
    down.weight, up.weight = (nn.Parameter(part[0].contiguous(), requires_grad=False) for part in (right, left))
    up.bias = None if module.bias is None else nn.Parameter(module.bias.detach().to(left.dtype), requires_grad=False)
    return nn.Sequential(down, up)
