"""``foveate reference classifier``: weights of index_preserving's cell classifier, from scenes whose contents are known."""

from __future__ import annotations

from pathlib import Path

import torch
import typer

from foveate import checkpoint, reference
from foveate.core.artifact import FOLDER, Artifact
from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.methods import IndexPreserving
from foveate.methods.before_encoder.index_preserving import cell_logits, dilated, train
from foveate.models import anatomy
from foveate.reference.cells import labelled_cells
from foveate.tasks.spine import GRID

HELD_OUT = 500
"""Scenes that the classifier is measured on."""


def classifier(folder: Path | None, scenes: int, steps: int, seed: int) -> None:
    """Train on ``scenes`` pictures, measure on others, and keep the weights in the checkpoint's folder."""
    folder = folder or reference.path()
    traits = anatomy(checkpoint.load(str(folder), "cpu", "float32").model).traits()
    cells, labels = labelled_cells(scenes, seed)
    weights = train(cells.flatten(0, 1), labels.flatten(), steps=steps, seed=seed)
    measured = evaluate(weights, *labelled_cells(HELD_OUT, seed, "test"))
    path = folder / FOLDER / f"{IndexPreserving.name}.json"
    Artifact(IndexPreserving.name, traits.fingerprint, {"cell": list(cells.shape[2:]), **measured, **weights}).save(path)
    typer.echo("  ".join(f"{name.replace('_', ' ')} {share:.1%}" for name, share in measured.items()))
    typer.echo(f"{path}")


def evaluate(weights: dict[str, torch.Tensor], cells: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Shares on pictures ``[I, N, C, h, w]`` with labels ``[I, N]``, at the default threshold and dilation.

    ``accuracy`` on cells, ``foreground`` among them, cells ``kept`` once dilated, and the ``recall`` of foreground by these.
    """
    method, whole = IndexPreserving(), torch.ones_like(labels)
    grids = [[Item(GRID, GRID, number)] for number in range(len(labels))]
    layout = Layout.build(whole, whole, torch.zeros(1, *labels.shape, dtype=torch.long), grids)
    found = cell_logits(cells.flatten(2), weights) > method.threshold
    kept = dilated(found, layout, method.kernel)
    return {
        "accuracy": (found == labels).float().mean().item(),
        "foreground": labels.float().mean().item(),
        "kept": kept.float().mean().item(),
        "recall": kept[labels].float().mean().item(),
    }
