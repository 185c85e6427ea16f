"""The examples of a bench: the first questions of each task, and what every method left of their pictures."""

from __future__ import annotations

from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image

from foveate.bench.cells import keep_text
from foveate.bench.folder import Results
from foveate.core.errors import FoveateError


def gallery(folder: Results) -> dict[str, Any] | None:
    """What the page's script draws from, as JSON; None where the folder holds no pictures.

    ``images``: each picture once, with its size. ``tasks``: for each task its questions; a question has the grids over each
    picture with their evidence, and for every method and budget what it answered and how deep each token came.
    """
    images: dict[str, Any] = {}
    tasks: dict[str, dict[int, dict[str, Any]]] = {}
    layers = 0
    for record in folder.records:
        cell = folder.details(record)
        layers = max(layers, len(cell.get("visual_by_layer", [])))
        questions = tasks.setdefault(record.task, {})
        for number, (pictures, answer) in enumerate(zip(cell.get("examples", []), cell["answers"])):
            if not pictures:
                continue
            for picture in pictures:
                if picture["png"] not in images:
                    images[picture["png"]] = _image(folder.path / "examples" / picture["png"])
            asked = questions.setdefault(number, _question(answer, pictures))
            said = {"prediction": answer["prediction"], "score": answer["score"]}
            depth = [[view["depth"] for view in picture["views"]] for picture in pictures]
            asked["cells"].append({"method": record.method, "keep": keep_text(record.keep), "depth": depth, **said})
    if not images:
        return None
    listed = {task: list(questions.values()) for task, questions in tasks.items() if questions}
    return {"layers": layers, "images": images, "tasks": listed}


def _question(answer: dict[str, Any], pictures: list[dict[str, Any]]) -> dict[str, Any]:
    grids = ("rows", "columns", "evidence")
    shown = [{"png": p["png"], "views": [{name: view[name] for name in grids} for view in p["views"]]} for p in pictures]
    return {"prompt": answer["prompt"], "answer": answer["answer"], "pictures": shown, "cells": []}


def _image(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
        with Image.open(BytesIO(content)) as picture:
            width, height = picture.size
    except OSError as error:
        raise FoveateError(f"folder={str(path.parents[1])!r}: examples/{path.name} cannot be read ({error})") from error
    return {"uri": f"data:image/png;base64,{b64encode(content).decode()}", "width": width, "height": height}
