"""The pictures of the first questions, and what became of their tokens."""

from __future__ import annotations

from base64 import b64decode
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from foveate.bench.cells import plan
from foveate.bench.examples import illustrate
from foveate.bench.folder import ResultFolder
from foveate.bench.run import run
from foveate.tasks import Question, Turn, evidence_cells, questions


def test_depth_counts_the_layers_that_a_token_enters() -> None:
    (asked,) = questions("shape", 1, 0)
    alive = [torch.arange(4), torch.tensor([0, 3]), torch.tensor([3])]

    ((view,),) = [picture.views for picture in illustrate(asked, [(2, 2)], [[tokens] for tokens in alive])]

    assert view.depth == "2 1 1 3"
    assert view.evidence == np.flatnonzero(evidence_cells(asked.evidence[0], 2, 2)).tolist()


def test_each_picture_has_its_own_views() -> None:
    (asked,) = questions("shape", 1, 0)
    both = Question("compare", (asked.image, asked.image), (Turn("same?", ("yes",)),))
    grids = [(1, 1), (1, 2), (1, 1), (1, 3)]

    pictures = illustrate(both, grids, [[torch.arange(rows * columns) for rows, columns in grids]])

    assert [[view.columns for view in picture.views] for picture in pictures] == [[1, 2], [1, 3]]
    assert pictures[0].views[0].evidence is None


def test_grids_that_belong_to_no_picture_are_not_shown() -> None:
    (asked,) = questions("shape", 1, 0)
    both = Question("compare", (asked.image, asked.image), asked.turns)

    assert illustrate(both, [(1, 1)], [[torch.arange(1)]]) == []
    assert illustrate(asked, [], []) == []


def test_large_pictures_are_made_smaller() -> None:
    photo = Question("own", (Image.new("L", (2000, 1000)),), (Turn("what?", ("nothing",)),))

    (picture,) = illustrate(photo, [(1, 1)], [[torch.arange(1)]])

    assert Image.open(BytesIO(b64decode(picture.png))).size == (512, 256)


def test_a_folder_holds_each_picture_once(folder: ResultFolder, measure: Any, log: Any) -> None:
    run(plan(["shape"], ["hiprune"], [0.5]), lambda task: questions(task, 20, 0), measure, folder, log)

    named = {
        picture["png"]
        for record in folder.records
        for pictures in folder.details(record)["examples"]
        for picture in pictures
    }
    files = list(Path(folder.path / "examples").iterdir())
    assert {file.name for file in files} == named
    assert len(files) == 2
    assert Image.open(files[0]).size == questions("shape", 1, 0)[0].image.size
