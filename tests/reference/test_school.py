"""Lessons for the larger models, and that what is trained is what transformers runs."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from foveate import reference
from foveate.reference.model import END, IMAGE, TOKEN_IDS, Dimensions
from foveate_reference.training.attention import attend_packed
from foveate_reference.training.extended import IDS, KINDS, WORDS, start_from
from foveate_reference.training.lessons import IGNORE, NAMES, Lesson, draw_batch
from foveate_reference.training.school import COURSES, Schooling, Settings, name_of, school
from foveate_reference.training.teacher import window_order, windows
from foveate_reference.training.windows import packed_mask

TINY = Dimensions(head_width=16, vision_width=32, vision_layers=3, decoder_width=32, decoder_layers=2, decoder_mlp=48)
LESSONS = [Lesson("spine", 96, 3, 40), Lesson("compare", 96, 2, 40), Lesson("document", 192, 2, 60)]


def settings(kind: str, **changes) -> Settings:
    return Settings(kind, **{"steps": 4, "start": (reference.path(),), "dimensions": TINY, **changes})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lesson", LESSONS, ids=name_of)
def test_training_computes_what_the_model_computes(kind, lesson):
    pupil = Schooling(settings(kind)).pupil.eval()
    batch = draw_batch(kind, lesson, seed=0, step=1)
    model = KINDS[kind].build(TINY).eval()
    model.load_state_dict(pupil.model.state_dict())
    length = int((batch.blocks[0] == 1).sum())
    ids = torch.cat([batch.prefix, batch.ids[0, :length]])[None]
    pictures = len(batch.vision["image_sizes" if KINDS[kind].tiled else "image_grid_thw"]) // len(batch.ids)
    if KINDS[kind].tiled:
        vision = {name: tensor[:pictures] for name, tensor in batch.vision.items()}
    else:
        grids = batch.vision["image_grid_thw"][:pictures]
        vision = {"pixel_values": batch.vision["pixel_values"][: int(grids.prod(1).sum())], "image_grid_thw": grids}
        vision["mm_token_type_ids"] = (ids == IDS[IMAGE]).int()
    with torch.no_grad():
        answers, _ = pupil(batch)
        expected = model(input_ids=ids, **vision).logits[0, len(batch.prefix) :]
    wanted = batch.targets[0, :length] >= 0
    torch.testing.assert_close(answers[: int(wanted.sum())], expected[wanted], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_functions_of_seed_and_step(kind):
    first, second, other = (draw_batch(kind, LESSONS[0], 0, step) for step in (1, 1, 2))
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.vision["pixel_values"], second.vision["pixel_values"])
    assert not torch.equal(first.ids, other.ids)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", ["document", "screen", "chart", "needle", "caption"])
def test_targets_are_the_answers(kind, task):
    batch = draw_batch(kind, Lesson(task, 96, 2, 60), seed=0, step=3)
    asked = batch.targets >= 0
    assert asked.any(1).all()
    after = torch.roll(batch.ids, -1, 1)
    assert torch.equal(batch.targets[asked], after[asked])
    assert (batch.turns[asked] >= 0).all()
    assert (batch.targets[~asked] == IGNORE).all()


@pytest.mark.parametrize("kind", KINDS)
def test_labels_name_what_a_cell_shows(kind):
    batch = draw_batch(kind, Lesson("needle", 96, 4, 30), seed=0, step=0)
    shapes, nothing = batch.names[0], len(NAMES[0])
    for each in shapes:
        shown = set(each[(each != nothing) & (each != IGNORE)].tolist())
        assert len(shown) == 1
    assert batch.rows.max() < 12
    assert batch.columns.max() < 12
    assert batch.shown.any((1, 2)).all()
    assert batch.shown.float().mean() < 0.1


def test_large_pictures_come_late():
    course = settings("tiles", steps=100)
    early = {course.lesson(step, {}).side for step in range(15)}
    late = {course.lesson(step, {}).side for step in range(60, 100)}
    assert (early, late) == ({96}, {96, 192})


def test_what_half_succeeds_is_taught_most():
    course = settings("tiles", steps=2000)
    known = {name_of(lesson): 1.0 for lesson in COURSES["tiles"].small} | {"screen96": 0.5, "document96": 0.0}
    drawn = [course.lesson(step, known).task for step in range(300)]
    assert drawn.count("screen") > 2 * drawn.count("document")
    assert drawn.count("document") > 0


@pytest.mark.parametrize("task", ["characters", "glance"])
def test_exercises_ask_for_what_is_written(task):
    batch = draw_batch("qwen", Lesson(task, 96, 8, 60), seed=0, step=0)
    letters = {IDS[name] for name in NAMES[2]}
    answered = batch.targets[batch.targets >= 0]
    assert set(answered.tolist()) <= letters | {IDS[END]}
    assert (answered != IDS[END]).any()


def test_packed_attention_is_attention():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, 13, 8)
    text = packed_mask(torch.tensor([[1, 1, 2, 0], [1, 2, 2, 2]]), prefix=9)[:, :, 9:]
    mask = torch.cat([torch.ones(2, 1, 9, 13, dtype=torch.bool).tril(), text], 2)
    additive = torch.zeros(text.shape).masked_fill(~text, -1e4)
    ours, _ = attend_packed(torch.nn.Module(), query, key, value, additive, scaling=8**-0.5)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(ours, wanted.transpose(1, 2))
    ours, _ = attend_packed(torch.nn.Module(), query, key, value, None, scaling=8**-0.5)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2))


def test_words_of_the_small_model_keep_their_ids():
    assert {word: IDS[word] for word in TOKEN_IDS} == TOKEN_IDS
    assert len(set(WORDS)) == len(WORDS)


def test_a_start_gives_its_weights():
    torch.manual_seed(0)
    one, other = KINDS["qwen"].build(TINY), KINDS["tiles"].build(TINY)
    start_from(one, other)
    assert torch.equal(one.get_input_embeddings().weight, other.get_input_embeddings().weight)


@pytest.mark.parametrize("side", [96, 192])
def test_windows_are_the_teachers_pictures(side):
    batch = draw_batch("qwen", Lesson("screen", side, 2, 40), seed=0, step=0)
    tiled = draw_batch("tiles", Lesson("screen", side, 2, 40), seed=0, step=0)
    shown = windows(batch.vision["pixel_values"], window_order(batch.vision["image_grid_thw"]))
    # The teacher's processor gives an overview and then the tiles; small pictures are enlarged for those.
    wanted = tiled.vision["pixel_values"][:, :1] if side == 96 else tiled.vision["pixel_values"][:, 1:5]
    torch.testing.assert_close(shown, wanted.flatten(0, 1))


def test_the_eyes_learn_first(tmp_path):
    torch.manual_seed(0)
    teacher = KINDS["tiles"].build(TINY)
    teacher.save_pretrained(tmp_path)
    run = Schooling(settings("qwen", teacher=tmp_path, looking=1))
    before = {name: weight.clone() for name, weight in run.pupil.model.state_dict().items()}
    lesson = Lesson("spine", 96, 2, 40)
    told = run.advance(draw_batch("qwen", lesson, 0, 0), lesson)
    moved = {name for name, weight in run.pupil.model.state_dict().items() if not torch.equal(weight, before[name])}
    assert {name.split(".")[1] for name in moved} == {"visual"}
    assert {"imitated_early", "imitated_late"} <= told.keys()
    run.advance(draw_batch("qwen", lesson, 0, 1), lesson)
    assert not torch.equal(run.pupil.model.get_input_embeddings().weight, before["model.language_model.embed_tokens.weight"])
    assert not any("teacher" in name for name in run.pupil.state_dict())


@pytest.mark.slow
def test_a_resumed_run_is_the_run(tmp_path):
    course = settings("tiles", steps=2)
    whole = school(tmp_path / "whole", course)
    school(tmp_path / "halves", course, lambda: True)
    halves = school(tmp_path / "halves", course)
    assert (whole.step, halves.step) == (2, 2)
    for name, weight in whole.pupil.state_dict().items():
        torch.testing.assert_close(halves.pupil.state_dict()[name], weight, atol=1e-5, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_the_export_answers(kind, tmp_path):
    Schooling(settings(kind)).export(tmp_path)
    processor = reference.processor(tmp_path)
    image = np.zeros((96, 96, 3), np.uint8)
    turns = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is it?"}]}]
    inputs = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert int((inputs["input_ids"] == IDS[IMAGE]).sum()) == {"tiles": 300, "qwen": 36}[kind]
