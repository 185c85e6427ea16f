"""Pictures that are the frames of videos: as methods meet them, and what is refused."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.stream import Memory
from foveate.engine.films import joined
from foveate.engine.session import Session, attach
from foveate.methods import EVS, VidCom2
from foveate.models.anatomy import Picture, View
from tests import tiny
from tests.engine.test_side import READ, Reader, read
from tests.suite.bodies import BODIES, Sample
from tests.videos import prompt, qwen_pixels

TWO: list[Sample] = [(3, 4, 6), (2, 6, 9)]
"""Two prompts, of a video of four frames and one of six, of different lengths."""
QWEN, CLIP = BODIES["qwen2_5_vl"], BODIES["llava-clip"]


def pictured(videos: Tensor) -> dict[str, Tensor]:
    """One prompt for a Qwen with the frames of ``videos`` ``[V, T, 3, 32, 32]`` as pictures, words between them."""
    frames = videos.flatten(0, 1)
    ids = [1]
    for _ in frames:
        ids += [11, *[tiny.IMAGE] * 16]
    ids += range(20, 26)
    inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == tiny.IMAGE).long()
    pixels = torch.cat([qwen_pixels(frame[None]) for frame in frames])
    return {**inputs, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 8, 8]]).repeat(len(frames), 1)}


def moving(videos: int = 1, frames: int = 4) -> Tensor:
    return torch.randn(videos, frames, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def alive(session: Session, sample: int = 0) -> list[list[int]]:
    return [item.tolist() for item in session.trace.alive(1)[sample]]


@torch.no_grad()
def kept(model: Any, recipe: Any, inputs: dict[str, Tensor], films: Sequence[int]) -> list[list[list[int]]]:
    with attach(model, recipe) as session, session.films(films):
        model(**inputs)
    return [alive(session, sample) for sample in range(len(inputs["input_ids"]))]


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("recipe", ["evs(rate=0.6)", "vidcom2(keep=0.3)", "merge3d(keep=0.5, geometry='none')"])
@pytest.mark.filterwarnings("ignore::foveate.NeedsTraining")
def test_methods_meet_what_they_would_of_a_real_video(family: str, recipe: str) -> None:
    model, videos = BODIES[family].model(), moving(2)
    videos[1, 1:] = videos[1, :1]
    with attach(model, recipe) as session, torch.no_grad():
        model(**prompt(family, videos))
    real = alive(session)

    assert kept(model, recipe, pictured(videos), [4, 4]) == [real]
    assert session.trace.grids == [[(16, 4), (16, 4)]]
    assert sum(map(len, real)) < 128


@pytest.mark.parametrize("body", [QWEN, CLIP], ids=["qwen2_5_vl", "llava-clip"])
@pytest.mark.parametrize("method", [EVS(rate=0.6), VidCom2(keep=0.4)], ids=["evs", "vidcom2"])
def test_videos_of_a_batch_have_the_frames_they_have(body: Any, method: Any) -> None:
    model = body.model()
    both = kept(model, method, body.inputs(TWO), [4, 6])

    assert [[len(item) for item in items] for items in both] == [[int(64 * 0.4)], [int(96 * 0.4)]]
    assert both[0] == kept(model, method, body.inputs(TWO, only=0), [4])[0]
    assert both[1] == kept(model, method, body.inputs(TWO, only=1), [6])[0]


def test_a_prompt_may_show_videos_and_pictures() -> None:
    model = QWEN.model()
    (items,) = kept(model, EVS(rate=0.5), QWEN.inputs([(3, 6, 5)]), [3, 1, 2])

    assert [len(item) for item in items] == [24, 16, 16]
    assert items[0][:16] == items[1] == list(range(16))  # first frames and pictures stay whole


def test_without_being_told_pictures_are_pictures() -> None:
    model = QWEN.model()
    with attach(model, EVS(rate=0.5)) as session, torch.no_grad():
        with session.films([4, 6]):
            pass
        model(**QWEN.inputs(TWO))
    assert [len(item) for item in alive(session, 1)] == [16] * 6


def test_generate_and_its_beams() -> None:
    model, inputs = QWEN.model(), QWEN.inputs(TWO)
    settings: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**inputs, **settings, num_beams=2)
    with attach(model, EVS(rate=0.0)) as session, session.films([4, 6]):
        assert torch.equal(model.generate(**inputs, **settings, num_beams=2), plain)
    with attach(model, EVS(rate=0.5)) as session, session.films([4, 6]):
        model.generate(**inputs, **settings, num_beams=2)
    assert [len(item) for item in alive(session)] == [32]


def test_what_was_encoded_earlier_keeps_its_films() -> None:
    model, inputs = QWEN.model(), QWEN.inputs([(3, 4, 6)])
    with attach(model, EVS(rate=0.5)) as session, torch.no_grad():
        with session.films([4]):
            encoded = session.encode(**inputs)
        model(**QWEN.without_pictures(inputs), **encoded)
    assert [len(item) for item in alive(session)] == [32]


def test_side_data_is_of_the_video() -> None:
    READ.clear()
    session = attach(CLIP.model(), Recipe((Reader(),)))
    with session.side(images={"depth": [3, 5]}), session.films([4, 6]), torch.no_grad():
        session.anatomy.model(**CLIP.inputs(TWO))
    assert read("sequence") == [3, 5]


def test_lines_that_end_stay_where_they_are() -> None:
    line = torch.tensor([[0, 0], [0, 1], [-1, -1], [0, 2], [0, 3], [-1, -1]])
    frames = [Picture((View(2, 2, cells=torch.arange(4)[:, None] + 4 * number),), line) for number in range(3)]

    alone, film = joined(frames, [1, 2])

    assert alone is frames[0]
    (view,) = film.views
    assert (view.rows, view.columns, view.frames) == (4, 2, 2)
    assert view.cells is not None
    assert view.cells[:, 0].tolist() == list(range(4, 12))
    assert film.placement.tolist() == [*line.tolist(), [0, 4], [0, 5], [-1, -1], [0, 6], [0, 7], [-1, -1]]
    assert film.slots[0].tolist() == [0, 1, 3, 4, 6, 7, 9, 10]


@pytest.mark.parametrize("counts", [[], [0], [2, -1], [2.0]])
def test_counts_are_counts(counts: list[Any]) -> None:
    words = rf"^films={re.escape(str(counts))}: must be how many consecutive pictures make each video, such as \[6, 6\]; 1 ="
    with attach(QWEN.model(), EVS()) as session, pytest.raises(FoveateError, match=words):
        session.films(counts)


@pytest.mark.parametrize(
    ("films", "words"),
    [
        ([4, 5], r"^films=\[4, 5\]: are 9 frames, but 10 pictures are encoded; say of each which video it is of"),
        ([5, 5], r"^films: a video of 5 frames goes on beyond its prompt; count the pictures of each prompt$"),
    ],
)
def test_films_have_the_frames_of_their_prompt(films: list[int], words: str) -> None:
    model = QWEN.model()
    with attach(model, EVS()) as session, session.films(films), torch.no_grad(), pytest.raises(FoveateError, match=words):
        model(**QWEN.inputs(TWO))


def test_frames_are_of_one_size() -> None:
    model = QWEN.model()
    grid = torch.tensor([[1, 8, 8], [1, 8, 4], [1, 8, 4], [1, 8, 8]])
    pixels = torch.randn(int(grid.prod(1).sum()), 48)
    words = r"^films: picture 1 is 4 x 2 tokens and the video begins with 4 x 4; give frames of one size$"
    with attach(model, EVS()) as session, session.films([2, 2]), pytest.raises(FoveateError, match=words):
        session.encode(pixel_values=pixels, image_grid_thw=grid)


def test_a_frame_in_tiles_is_refused() -> None:
    body = BODIES["llava_next"]
    words = r"^films: picture 0 comes in 2 grids \(tiles, or an overview and details\), and a frame has one; "
    with attach(body.model(), EVS()) as session, session.films([2]), pytest.raises(FoveateError, match=words):
        session.anatomy.model(**body.inputs([(3, 2, 6)]))


def test_blocks_of_the_encoder_run_for_frames_as_for_those_of_a_stream() -> None:
    model, inputs = CLIP.model(), CLIP.inputs([(3, 6, 6)])
    recipe = "stc(keep=0.5, interval=2, update=0.5, chunk=2)"
    with attach(model, recipe) as session, session.streaming(Memory()), torch.no_grad():
        streamed = model(**inputs).logits
    by_picture = [[number * 16 + cell for cell in cells] for number, cells in enumerate(alive(session))]
    with attach(model, recipe) as session, session.films([6]), torch.no_grad():
        filmed = model(**inputs).logits
    with attach(model, recipe) as apart, torch.no_grad():
        pictures = model(**inputs).logits

    assert alive(session) == [[*itertools.chain(*by_picture)]]
    torch.testing.assert_close(filmed, streamed)
    assert apart.trace.grids == [[(4, 4)] * 6]
    assert (pictures - filmed).abs().max() > 1e-4
