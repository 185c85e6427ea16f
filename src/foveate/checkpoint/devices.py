"""Where a model runs, and in which numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from foveate.core.errors import FoveateError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_device(device: str, model_args: Mapping[str, Any] | None = None) -> str:
    """``auto`` becomes the accelerator that is there; anything else must be a device that works.

    ``model_args`` are those that the model is loaded with: a ``device_map`` among them places it, and ``device`` must be
    ``auto``.
    """
    if "device_map" in (model_args or {}) and device != "auto":
        raise FoveateError(f"device={device!r}: the device_map of --model-args places the model; give one of them")
    usable = _usable()
    if device == "auto":
        return usable[0]
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FoveateError(f"device={device!r}: is not available here; use {', '.join(usable)} or auto") from error
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """``auto`` becomes float32 on a CPU, where it is the fastest that all of them have, and bfloat16 elsewhere."""
    if dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise FoveateError(f"dtype={dtype!r}: must be auto, {', '.join(DTYPES)}")
    return dtype


def _usable() -> list[str]:
    """Kinds of devices that are here, the fastest first."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
