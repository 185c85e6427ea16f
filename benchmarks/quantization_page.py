"""The page of `benchmarks.quantization`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def page(content: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    return "# Quantized models, measured\n"
