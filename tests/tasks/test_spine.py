"""Answers are right by construction, splits are disjoint, scoring does what the tasks say."""

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from foveate.tasks import SPINE, Question, Turn, evidence_cells, majority, questions, spine
from foveate.tasks.metrics import words
from foveate.tasks.scenes import draw_scene
from foveate.tasks.spine import GRID, KINDS, KINDS_OF, NUMBERS, PATCH, VOCABULARY


def asked_about_scenes(kind: str, n: int = 80):
    for seed in range(n):
        rng = np.random.default_rng(seed)
        scene = draw_scene(rng)
        if (asked := KINDS[kind](scene, rng, (0, 0))) is not None:
            yield scene, asked


@pytest.mark.parametrize("task", SPINE)
def test_questions_are_deterministic(task):
    first, second = questions(task, 5, seed=3), questions(task, 5, seed=3)
    assert [(q.prompt, q.answer) for q in first] == [(q.prompt, q.answer) for q in second]
    assert all(np.array_equal(a.image, b.image) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("task", SPINE)
def test_splits_and_seeds_share_no_picture(task):
    streams = [questions(task, 20, seed, split) for seed in (0, 1) for split in ("train", "validation", "test")]
    pictures = [q.image.tobytes() for stream in streams for q in stream]
    assert len(set(pictures)) == len(pictures)


def test_colour_is_that_of_the_only_such_shape():
    for scene, asked in asked_about_scenes("colour"):
        (thing,) = [thing for thing in scene.things if thing.shape in words(asked.prompt)]
        assert thing.colour == asked.answer


def test_shape_is_that_of_the_only_thing_in_the_colour():
    for scene, asked in asked_about_scenes("shape"):
        (thing,) = [thing for thing in scene.things if thing.colour in words(asked.prompt)]
        assert thing.shape == asked.answer


def test_existence_says_whether_the_pair_occurs():
    for scene, asked in asked_about_scenes("existence"):
        said = set(words(asked.prompt))
        assert (asked.answer == "yes") == any({thing.colour, thing.shape} <= said for thing in scene.things)


def test_existence_is_balanced():
    answers = [q.answer for q in questions("existence", 400, seed=0)]
    assert 0.42 < answers.count("yes") / 400 < 0.58


@pytest.mark.parametrize("kind", KINDS_OF["counting"])
def test_count_is_the_number_of_evidence_things(kind):
    for _, asked in asked_about_scenes(kind):
        assert asked.answer == NUMBERS[len(asked.things)]


@pytest.mark.parametrize("kind", KINDS_OF["position"])
def test_position_is_the_cell_of_the_centre(kind):
    for scene, asked in asked_about_scenes(kind):
        x, y = scene.things[asked.things[0]].centre
        assert asked.answer == f"row{int(y) // PATCH + 1} col{int(x) // PATCH + 1}"


def test_evidence_is_empty_where_nothing_proves_the_answer():
    for q in questions("existence", 40, seed=0) + questions("counting", 40, seed=0):
        assert q.evidence[0].any() == (q.answer not in ("no", "zero"))


@pytest.mark.parametrize("task", SPINE)
def test_vocabulary_has_every_word(task):
    assert {word for q in questions(task, 200, seed=5) for word in words(f"{q.prompt} {q.answer}")} <= set(VOCABULARY)


@pytest.mark.parametrize(
    ("prediction", "right"),
    [("row4 col6", 1.0), ("row3 col7", 1.0), ("row5 col7", 0.0), ("row3", 0.0), ("row7 col3", 0.0), ("row12 col1", 0.0)],
)
def test_position_may_be_off_by_one(prediction, right):
    picture = questions("position", 1, seed=0)[0]
    near = spine._near("row3 col7")
    assert Question("position", picture.images, (Turn("", near),)).score([prediction]) == right


def test_position_at_the_border_has_neighbours_inside_only():
    assert set(spine._near("row12 col1")) == {"row12 col1", "row12 col2", "row11 col1", "row11 col2"}


def test_majority_beats_other_constants():
    asked = questions("counting", 200, seed=0)
    best = sum(q.score([majority("counting")]) for q in asked)
    assert best >= max(sum(q.score([number]) for q in asked) for number in NUMBERS) - 20


def test_majority_position_is_a_cell_near_the_middle():
    row, column = (int(word[3:]) for word in majority("position").split())
    assert 3 <= row <= GRID - 2
    assert 3 <= column <= GRID - 2


def test_evidence_cells_on_a_grid_that_does_not_divide_the_picture():
    mask = np.zeros((10, 10), bool)
    mask[0, 0] = mask[9, 5:] = True
    assert evidence_cells(mask, 3, 3).tolist() == [[True, False, False], [False, False, False], [False, True, True]]


def test_unknown_task_is_refused_by_name():
    with pytest.raises(FoveateError, match="task='colour': must be one of attribute"):
        questions("colour", 1, seed=0)
