"""``foveate calibrate``: the numbers that a method needs from the model it is to run on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import typer
from PIL import Image

from foveate import checkpoint, tasks
from foveate.checkpoint import Checkpoint, load_processor, refusal
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import OwnData
from foveate.cli.progress import StepProgress
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable
from foveate.engine.calibrate import Batches, to_calibrate
from foveate.engine.calibrate import calibrate as make_artifact
from foveate.tasks import Question, files
from foveate.tasks.scenes import draw_scene

OUT = Path("runs/calibrate")
EACH, OWN, DRAWN = 16, 96, 2000
"""Questions of each generated task, of the user's own, and drawn scenes, unless a number is given."""

T = TypeVar("T")

Marked = tuple[Image.Image, np.ndarray]
"""A picture, and where it shows what counts: bool ``[H, W]``."""


@dataclass(frozen=True)
class CalibrateRequest:
    """The options of the command, as they were given."""

    method: str
    model: str
    data: Path | None
    n: int | None
    out: Path | None
    seed: int
    device: str
    dtype: str
    batch_size: int


def calibrate(request: CalibrateRequest) -> None:
    """Make the artifact of a method, and keep it in a folder."""
    offline = to_calibrate(request.method)
    folder = request.out or OUT / _named(request.model)
    path = folder / f"{offline.name}.json"
    make_writable(folder)
    for there in (path, path.with_suffix(".safetensors")):
        if there.is_dir():
            raise FoveateError(
                f"out={str(folder)!r}: holds a folder {there.name!r}, in the way of the file; name another folder"
            )
    pictures = marked_pictures(request) if offline.marked else []
    asked = [] if offline.marked else questions(request)
    device = checkpoint.resolve_device(request.device)
    loaded = checkpoint.load(request.model, device, checkpoint.resolve_dtype(request.dtype, device))
    loaded.refuse_placeholders(turn.prompt for each in asked for turn in each.turns)
    batches, marks = _marked_batches(loaded, pictures, request) if offline.marked else (_batches(loaded, asked, request), [])
    try:
        with StepProgress(diagnostics()) as progress:
            artifact = make_artifact(offline, loaded.model, batches, marks=marks, watcher=progress)
        artifact.save(path)
    except KeyboardInterrupt:
        diagnostics().print("foveate: interrupted; nothing is written")
        raise typer.Exit(INTERRUPTED) from None
    except OSError as error:
        raise FoveateError(f"out={str(folder)!r}: cannot be written ({error.strerror}); name another folder") from error
    shares = {name: share for name, share in artifact.numbers.items() if isinstance(share, float)}
    if shares:
        output().print("  ".join(f"{name} {share:.1%}" for name, share in shares.items()))
    typer.echo(f"{path}")


def _named(model: str) -> str:
    """A folder's name for the model of that name."""
    return Path(model).absolute().name if Path(model).is_dir() else model.replace("/", "--")


def questions(request: CalibrateRequest) -> list[Question]:
    """What the model is asked: generated ones, not the test questions, on which it will be measured; or the user's own."""
    if request.data is None:
        n = request.n or EACH
        return [each for task in tasks.SPINE for each in tasks.questions(task, n, request.seed, split="validation")]
    return _own(request, request.n or OWN)


def marked_pictures(request: CalibrateRequest) -> list[Marked]:
    """Drawn scenes with all that is in them, or the user's pictures with all evidence for what is asked about each."""
    if request.data is None:
        drawn = (
            draw_scene(np.random.default_rng([0, request.seed, index, 4]), sign_rate=0.5)
            for index in range(request.n or DRAWN)
        )
        return [(scene.image, scene.masks.any(0) | scene.letter_masks.any(0)) for scene in drawn]
    found: dict[tuple[tuple[int, int], bytes], Marked] = {}
    for asked in _own(request, request.n):
        for picture, mask in zip(asked.images, asked.evidence):
            key = picture.size, picture.tobytes()
            found[key] = picture, mask | found[key][1] if key in found else mask
    if not found:
        raise FoveateError(
            f"data={str(request.data)!r}: column 'evidence' is empty; {request.method} learns from it what counts"
        )
    return list(found.values())


def _own(request: CalibrateRequest, n: int | None) -> list[Question]:
    assert request.data is not None
    asked, left_out = files.sift(request.data, partial(refusal, load_processor(request.model)), n=n)
    OwnData.warn(left_out)
    return asked


def _batches(loaded: Checkpoint, asked: Sequence[Question], request: CalibrateRequest) -> Batches:
    return [
        loaded.inputs([each.images for each in chunk], [each.turns[0].prompt for each in chunk])
        for chunk in _chunks(asked, request.batch_size)
    ]


def _marked_batches(loaded: Checkpoint, pictures: Sequence[Marked], request: CalibrateRequest) -> tuple[Batches, Batches]:
    """The pictures, and their marks as pictures in black and white."""
    shown, marks = [], []
    for chunk in _chunks(pictures, request.batch_size):
        prompts = ["?"] * len(chunk)
        shown.append(loaded.inputs([[picture] for picture, _ in chunk], prompts))
        marks.append(loaded.inputs([[Image.fromarray(mask).convert("RGB")] for _, mask in chunk], prompts))
    return shown, marks


def _chunks(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (whole[start : start + size] for start in range(0, len(whole), size))
