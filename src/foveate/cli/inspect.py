"""``foveate inspect``: what becomes of the tokens of a picture under a recipe, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from foveate import checkpoint, tasks
from foveate.bench.measure import evidence_recalls
from foveate.checkpoint import Checkpoint
from foveate.cli.console import output
from foveate.cli.own_data import reads_text
from foveate.cli.pictures import picture
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable, write_whole
from foveate.core.recipe import Recipe
from foveate.core.report import Trace
from foveate.report.inspection import Inspection, Subject, cards, figure, page, png
from foveate.report.numbers import NOTHING, percent
from foveate.report.stages import Stage, Story, story
from foveate.tasks import Question, Turn, evidence_cells


@dataclass(frozen=True)
class InspectRequest:
    """The options of the command, as they were given."""

    images: Sequence[str]
    prompt: str | None
    task: str | None
    index: int
    recipe: str
    against: str | None
    model: str
    out: Path
    max_new_tokens: int
    seed: int
    device: str
    dtype: str
    companion: str | None
    artifacts: str | None = None
    model_args: str | None = None
    system: str | None = None


@quiet()
def inspect(request: InspectRequest) -> None:
    """Answer under each recipe, draw, write, and say what there is."""
    arguments = checkpoint.parse_model_args(request.model_args)
    if reads_text(request.model, arguments):
        raise FoveateError(
            f"model={request.model!r}: reads text alone, and pictures are what is drawn; foveate run says what a recipe "
            "keeps of a prompt's cache"
        )
    asked = _question(request)
    recipes = [Recipe.of(text) for text in (request.recipe, request.against) if text is not None]
    make_writable(request.out)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    beside = (request.companion, request.artifacts, arguments, request.system)
    loaded = checkpoint.load(request.model, device, dtype, *beside)
    loaded.refuse_placeholders([asked.prompt])
    inspections = [look(loaded, asked, recipe, request.seed) for recipe in recipes]
    subject = _subject(asked, loaded, inspections[0].story)
    drawn = [(inspection, cards(inspection, subject)) for inspection in inspections]
    files = {"inspect.png": png(figure(drawn, subject)), "inspect.html": page(drawn, subject).encode()}
    for name, content in files.items():
        write_whole(request.out / name, content)
    for inspection in inspections:
        output().print(_table(inspection))
    output().print(Text("\n".join(str(request.out / name) for name in files)))


def look(loaded: Checkpoint, asked: Question, recipe: Recipe, seed: int) -> Inspection:
    """Answer a question under a recipe and tell what became of its tokens."""
    prompts = [turn.prompt for turn in asked.turns]
    with loaded.attach(recipe, seed) as session:
        session.watch()
        traces = list[Trace]()
        said = loaded.converse(asked.images, prompts, asked.max_new_tokens, session, lambda: traces.append(session.trace))
    told = story(traces[0], len(asked.images))  # of the turn that brings the pictures
    recalls = tuple(_recall(asked, told, stage) for stage in told.stages)
    return Inspection(str(recipe), "\n".join(said), told, recalls)


def _recall(asked: Question, told: Story, stage: Stage) -> float | None:
    """Share of the evidence that goes on behind a stage: the bench's own number, and the mean of shares."""
    if stage.share is None or not asked.evidence:
        return evidence_recalls(asked, told.grids, [[torch.from_numpy(alive) for alive in stage.alive]])[0]
    shares = [share[cells.ravel()] for share, cells in zip(stage.share, _evidence(asked, told), strict=True)]
    return float(np.concatenate(shares).mean()) if sum(map(len, shares)) else None


def _evidence(asked: Question, told: Story) -> tuple[np.ndarray, ...]:
    """The cells of each grid that prove the answer; ``()`` where nobody knows."""
    masks = asked.evidence
    return tuple(evidence_cells(masks[of], *grid) for of, grid in zip(told.pictures, told.grids)) if masks else ()


def _question(request: InspectRequest) -> Question:
    """The question that was asked for: one's own, or a generated one."""
    if request.task is not None:
        if request.images or request.prompt is not None:
            raise FoveateError(f"task={request.task!r}: brings its own picture and prompt; leave out --image and --prompt")
        return tasks.question(request.task, request.seed, request.index)
    if not request.images or request.prompt is None:
        raise FoveateError("image: give --image and --prompt, or --task for a generated question")
    pictures = tuple(picture(name) for name in request.images)
    return Question("", pictures, (Turn(request.prompt, ("",)),), max_new_tokens=request.max_new_tokens)


def _subject(asked: Question, loaded: Checkpoint, told: Story) -> Subject:
    return Subject(
        pictures=tuple(_shown(picture, loaded) for picture in asked.images),
        prompt=asked.prompt,
        model=loaded.name,
        expected=asked.answer,
        evidence=_evidence(asked, told),
    )


def _shown(picture: Image.Image, loaded: Checkpoint) -> Image.Image:
    """The part of a picture that the model is shown: processors that crop cut off what sticks out of the middle."""
    processor: Any = getattr(loaded.processor, "image_processor", None)
    if not getattr(processor, "do_center_crop", False) or "shortest_edge" not in (processor.size or {}):
        return picture
    pixels = min(picture.size) / processor.size["shortest_edge"]
    width = min(picture.width, processor.crop_size["width"] * pixels)
    height = min(picture.height, processor.crop_size["height"] * pixels)
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    return picture.crop((round(left), round(top), round(left + width), round(top + height)))


def _table(inspection: Inspection) -> Table:
    table = Table(
        title=Text.assemble((inspection.recipe, "bold"), f" · {inspection.answer or NOTHING}"),
        title_justify="left",
        title_style="",
        box=SIMPLE_HEAD,
        padding=(0, 2, 0, 0),
        pad_edge=False,
    )
    for name in ("place", "method"):
        table.add_column(name)
    for name in ("tokens", "share %", "evidence %"):
        table.add_column(name, justify="right")
    for stage, recall in zip(inspection.story.stages, inspection.recalls):
        count = f"{stage.count:.1f}".removesuffix(".0")
        table.add_row(stage.title, stage.method or NOTHING, count, percent(stage.count / stage.total), percent(recall))
    return table
