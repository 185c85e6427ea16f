"""``foveate calibrate``: the numbers that a method needs from the model it is to run on."""

from __future__ import annotations

import typer

from foveate import checkpoint, tasks
from foveate.core.artifact import FOLDER
from foveate.core.errors import FoveateError
from foveate.engine.calibrate import calibrate as make_artifact
from foveate.engine.calibrate import to_calibrate


def calibrate(method: str, model: str, n: int, seed: int, device: str, dtype: str, batch_size: int) -> None:
    """Make the artifact of ``method`` and keep it in the model's folder."""
    offline = to_calibrate(method)
    folder = checkpoint.local_folder(model)
    if folder is None:
        raise FoveateError(f"model={model!r}: must be a checkpoint folder, to keep the numbers in; download the model first")
    device = checkpoint.resolve_device(device)
    loaded = checkpoint.load(model, device, checkpoint.resolve_dtype(dtype, device))
    # Not the test questions, on which the method will be measured.
    asked = [each for task in tasks.SPINE for each in tasks.questions(task, n, seed, split="validation")]
    chunks = [asked[start : start + batch_size] for start in range(0, len(asked), batch_size)]
    batches = [loaded.inputs([each.images for each in chunk], [each.prompt for each in chunk]) for chunk in chunks]
    path = folder / FOLDER / f"{offline.name}.json"
    make_artifact(offline, loaded.model, batches).save(path)
    typer.echo(f"{path}")
