"""``foveate calibrate``: the numbers that a method needs from the model it is to run on."""

from __future__ import annotations

import typer

from foveate import tasks
from foveate.bench import checkpoint
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.method import Offline
from foveate.engine.calibrate import calibrate as make_artifact
from foveate.models.anatomy import ARTIFACTS


def calibrate(name: str, model: str, n: int, seed: int, device: str, dtype: str, batch_size: int) -> None:
    """Make the artifact of method ``name`` and keep it in the model's folder."""
    if not issubclass(registry.get(name), Offline):
        raise FoveateError(f"{name}: has nothing to calibrate; it runs on any model that it supports as it is")
    folder = checkpoint.local_folder(model)
    if folder is None:
        raise FoveateError(f"model={model!r}: must be a checkpoint folder, to keep the numbers in; download the model first")
    device = checkpoint.resolve_device(device)
    loaded = checkpoint.load(model, device, checkpoint.resolve_dtype(dtype, device))
    # Not the test questions, on which the method will be measured.
    asked = [each for task in tasks.SPINE for each in tasks.questions(task, n, seed, split="validation")]
    chunks = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    batches = [loaded.inputs([each.images for each in chunk], [each.prompt for each in chunk]) for chunk in chunks]
    path = folder / ARTIFACTS / f"{name}.json"
    make_artifact(name, loaded.model, batches).save(path)
    typer.echo(f"{path}")
