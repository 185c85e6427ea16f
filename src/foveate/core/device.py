"""Numbers of the host, brought to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def upload(numbers: Any, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``numbers`` (a number, nested sequences of them, or a tensor on the CPU) as a tensor on ``device``.

    ``torch.tensor(numbers, device=device)`` has the host wait until the device has done all that it was told before; here
    the numbers are laid aside for it, and the host goes on.
    """
    made = numbers if isinstance(numbers, Tensor) else torch.tensor(numbers, dtype=dtype, device="cpu")
    return made.to(device, dtype, non_blocking=True)
