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
from rich.text import Text
from torch import Tensor

from foveate import checkpoint, tasks
from foveate.bench.questions import sift
from foveate.checkpoint import Checkpoint, is_text
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import OwnData
from foveate.cli.progress import StepProgress
from foveate.cli.quiet import quiet
from foveate.core.artifact import FOLDER
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable
from foveate.core.method import Offline
from foveate.engine.calibrate import Batches, refuse_labels, to_calibrate
from foveate.engine.calibrate import calibrate as make_artifact
from foveate.engine.session import Session
from foveate.tasks import Question, Turn
from foveate.tasks.pictures import Lazy, Source
from foveate.tasks.scenes import draw_scene

OUT = Path("runs/calibrate")
EACH, OWN, PICTURES = 16, 96, 2000
"""Questions of each generated task, of the user's own, and for a classifier, unless a number is given."""

T = TypeVar("T")


@dataclass(frozen=True)
class Marked:
    """A picture: the questions about it, and which of their pictures it is. What counts in it is all of their evidence."""

    asked: Sequence[tuple[Question, int]]

    @property
    def picture(self) -> Image.Image:
        """The picture itself."""
        question, number = self.asked[0]
        return question.images[number]

    @property
    def mark(self) -> Image.Image:
        """A picture of that size, white where it shows what counts and black elsewhere."""
        masks = [question.evidence[number] for question, number in self.asked]
        return Image.fromarray(np.logical_or.reduce(masks)).convert("RGB")


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
    model_args: str | None = None
    system: str | None = None


@quiet()
def calibrate(request: CalibrateRequest) -> None:
    """Make the artifact of a method, and keep it in a folder."""
    offline = to_calibrate(request.method)
    folder = request.out or OUT / named(request.model)
    path = folder / f"{offline.name}.json"
    make_writable(folder)
    for there in (path, path.with_suffix(".safetensors")):
        if there.is_dir():
            raise FoveateError(
                f"out={str(folder)!r}: holds a folder {there.name!r}, in the way of the file; name another folder"
            )
    pictures = marked_pictures(request) if offline.marked else []
    asked = [] if offline.marked else labelled(request, offline) if offline.labels else questions(request)
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    loaded = checkpoint.load(request.model, device, dtype, model_args=arguments, system=request.system)
    loaded.refuse_placeholders(turn.prompt for each in asked for turn in each.turns)
    if offline.marked:
        batches, marks = _marked_batches(loaded, pictures, request)
    else:
        batches, marks = batches_of(loaded, asked, request, answered=offline.answered), []
    try:
        with StepProgress(diagnostics()) as progress:
            labels = _labels(asked, request)
            artifact = make_artifact(
                offline,
                loaded.model,
                batches,
                marks=marks,
                labels=labels,
                watcher=progress,
                special=loaded.special,
            )
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
    own = checkpoint.local_folder(request.model)
    if own is None or folder.resolve() != (own / FOLDER).resolve():
        diagnostics().print(Text(f"other commands take it with --artifacts {folder}"))


def named(model: str) -> str:
    """A folder's name for the model of that name."""
    return Path(model).absolute().name if Path(model).is_dir() else model.replace("/", "--")


def questions(request: CalibrateRequest) -> list[Question]:
    """What the model is asked: generated ones, not the test questions, on which it will be measured; or the user's own."""
    if request.data is None:
        text = is_text(request.model, checkpoint.parse_model_args(request.model_args))
        names, n = tasks.TEXTS if text else tasks.SPINE, request.n or EACH
        return [each for task in names for each in tasks.questions(task, n, request.seed, split="validation")]
    return _own(request, request.n or OWN)


def labelled(request: CalibrateRequest, offline: Offline) -> list[Question]:
    """The user's prompts, whose answers say what kind each is; pictures need not be there."""
    kinds = " or ".join(map(repr, offline.labels))
    if request.data is None:
        raise FoveateError(f"{offline.name}: compares prompts of yours; give --data, a file whose answers are {kinds}")
    asked = _own(request, request.n, text=True)
    refuse_labels(offline, [_label(each) for each in asked])
    return asked


def marked_pictures(request: CalibrateRequest) -> list[Marked]:
    """Drawn scenes with all that is in them, or the user's pictures with all evidence for what is asked about each."""
    n = request.n or PICTURES
    if request.data is None:
        return [Marked([(_scene(request.seed, index), 0)]) for index in range(n)]
    found: dict[Source, list[tuple[Question, int]]] = {}
    for asked in _own(request, n):
        assert isinstance(asked.images, Lazy)
        for number, source in enumerate(asked.images.sources if asked.evidence else ()):
            found.setdefault(source, []).append((asked, number))
    if not found:
        raise FoveateError(
            f"data={str(request.data)!r}: column 'evidence' is empty; {request.method} learns from it what counts"
        )
    return [Marked(about) for about in found.values()]


def _scene(seed: int, index: int) -> Question:
    scene = draw_scene(np.random.default_rng([0, seed, index, 4]), sign_rate=0.5)
    everything = np.logical_or(scene.masks.any(0), scene.letter_masks.any(0))
    return Question("scene", [scene.image], (Turn("what is there?", ("everything",), [everything]),))


def _own(request: CalibrateRequest, n: int | None, text: bool = False) -> list[Question]:
    assert request.data is not None
    asked, left_out = sift(request.data, request.model, checkpoint.parse_model_args(request.model_args), text, n=n)
    OwnData.warn(left_out)
    return asked


def batches_of(
    loaded: Checkpoint,
    asked: Sequence[Question],
    request: CalibrateRequest,
    *,
    answered: bool = False,
    session: Session | None = None,
) -> Batches:
    """The first turns, with the answers to show behind them, if they are to be answered; pictures as ``session`` wants."""
    batches: list[dict[str, Tensor]] = []
    for chunk in _chunks(asked, request.batch_size):
        pictures, turns = [each.images for each in chunk], [each.turns[0] for each in chunk]
        prompts, answers = [turn.prompt for turn in turns], [turn.answers[0] for turn in turns]
        if answered:
            batches.append(loaded.answered(pictures, prompts, answers, session))
        else:
            batches.append(loaded.inputs(pictures, prompts, session))
    return batches


def _labels(asked: Sequence[Question], request: CalibrateRequest) -> list[list[str]]:
    return [[_label(each) for each in chunk] for chunk in _chunks(asked, request.batch_size)]


def _label(asked: Question) -> str:
    return asked.turns[0].answers[0]


def _marked_batches(loaded: Checkpoint, pictures: Sequence[Marked], request: CalibrateRequest) -> tuple[Batches, Batches]:
    """The pictures, and their marks as pictures in black and white; each batch is made when it is read, and once."""
    chunks = tuple(_chunks(pictures, request.batch_size))

    def inputs(chunk: Sequence[Marked], *, marks: bool) -> dict[str, Tensor]:
        return loaded.inputs([[each.mark if marks else each.picture] for each in chunk], ["?"] * len(chunk))

    return Lazy(partial(inputs, marks=False), chunks), Lazy(partial(inputs, marks=True), chunks)


def _chunks(whole: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (whole[start : start + size] for start in range(0, len(whole), size))
