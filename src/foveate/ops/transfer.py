"""Small numbers from the host to the device, without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``values`` (numbers, or rows of them) as a tensor on ``device``, queued behind what runs there.

    ``torch.tensor(values, device=device)`` would wait until the device has done all that was queued before.
    """
    pinned = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)
