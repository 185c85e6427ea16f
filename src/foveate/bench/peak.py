"""The most memory that a model took on its GPUs."""

from __future__ import annotations

import torch
from torch import nn


class Peak:
    """Counts from now on; weights and whatever else is there already are counted, too.

    Only what PyTorch allocates on GPUs is known. What a process takes of a CPU's memory says little about a model: memory
    that was freed is kept, and the system shares it as it likes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
        for gpu in self._gpus:
            torch.cuda.reset_peak_memory_stats(gpu)

    def bytes(self) -> int | None:
        """The sum over the model's GPUs; None where it has none."""
        return sum(torch.cuda.max_memory_allocated(gpu) for gpu in self._gpus) if self._gpus else None
