"""Weights under the names that published checkpoints have.

Some versions of transformers save a CLIP tower's weights one level higher than LLaVA's own checkpoints do. They all read
both; other readers, vLLM among them, know the published names alone.
"""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file

TOWER, NESTED = "vision_tower.", "vision_tower.vision_model."


def published(name: str) -> str:
    """A weight's published name, given any of the names it is saved under."""
    return name.replace(TOWER, NESTED, 1) if TOWER in name and NESTED not in name else name


def respell(folder: Path) -> None:
    """Give the weights in ``folder`` their published names."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({published(name): weight for name, weight in load_file(path).items()}, path, metadata=metadata)
