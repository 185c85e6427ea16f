"""The machine that results were measured on, by the names that people compare."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """System, processor and GPUs, cores and the threads that PyTorch uses of them."""
    return {
        "system": platform.platform(),
        "processor": _processor(),
        "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }


def device_name(device: str) -> str:
    """The model of the GPU or processor that is meant; the device as it was given where this machine has none such."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return str(torch.cuda.get_device_name(device))
    return f"{_processor()} ({torch.get_num_threads()} of {os.cpu_count()} cores)" if device == "cpu" else device


def _processor() -> str:
    """What the processor is called, as far as the system says so."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
