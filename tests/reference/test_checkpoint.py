"""The shipped checkpoint loads offline, fits any picture, and sees."""

import json

import pytest
import torch
from PIL import Image, ImageDraw

import foveate
from foveate import reference
from foveate.reference.model import TOKEN_IDS
from foveate.tasks import SPINE, Question, Turn, questions
from foveate.tasks.metrics import words
from foveate.tasks.spine import VOCABULARY
from foveate_reference.training.evaluate import FLOORS, answer

SAMPLE = 100
"""Questions per task; their standard error is about 0.04, hence the slack below the measured score."""


@pytest.fixture(scope="module")
def shipped():
    return reference.load()


def ask(shipped, image: Image.Image, prompt: str) -> str:
    return answer(*shipped, [Question("", (image,), (Turn(prompt, ("",)),))])[0][0]


def test_checkpoint_is_small():
    assert sum(file.stat().st_size for file in reference.path().rglob("*")) < 25e6


def test_config_has_both_spellings_of_the_image_token():
    config = json.loads((reference.path() / "config.json").read_text())
    assert config["image_token_id"] == config["image_token_index"] == TOKEN_IDS["<image>"]


@pytest.mark.parametrize("task", SPINE)
def test_accuracy(shipped, task):
    measured = json.loads((reference.path() / "evaluation.json").read_text())[task]["score"]
    asked = questions(task, SAMPLE, seed=11)
    right = sum(each.score(said) for each, said in zip(asked, answer(*shipped, asked), strict=True)) / SAMPLE
    assert right >= measured - 0.12


def test_evaluation_covers_every_floor():
    report = json.loads((reference.path() / "evaluation.json").read_text())
    assert {task: entry["floor"] for task, entry in report.items()} == {task: FLOORS[task] for task in SPINE}
    assert all(entry["below_floor"] == (entry["score"] < entry["floor"]) for entry in report.values())


def test_tokenizer_agrees_with_the_words_of_the_tasks(shipped):
    text = "What Colour is the star? Row3 col7, krt."
    ids = shipped[1].tokenizer(text)["input_ids"]
    assert ids == [TOKEN_IDS.get(word, TOKEN_IDS["<unk>"]) for word in words(text)]


def test_every_word_survives_the_tokenizer(shipped):
    tokenizer = shipped[1].tokenizer
    assert [tokenizer.decode(tokenizer(word)["input_ids"]) for word in VOCABULARY] == list(VOCABULARY)


@pytest.mark.parametrize(("mode", "size"), [("RGB", (200, 200)), ("L", (31, 500)), ("RGBA", (96, 96)), ("P", (640, 336))])
def test_any_picture_becomes_144_tokens(shipped, mode, size):
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many things are there?"}]}]
    prompt = shipped[1].apply_chat_template(messages, add_generation_prompt=True)
    inputs = shipped[1](images=Image.new(mode, size), text=prompt, return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 96, 96)
    assert (inputs["input_ids"] == TOKEN_IDS["<image>"]).sum() == 144


def test_chat_template_holds_several_turns_and_images(shipped):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "read the sign."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "k r t"}]},
        {"role": "user", "content": "where is the star?"},
    ]
    prompt = shipped[1].apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == "<user><image><image>read the sign.<assistant>k r t</s><user>where is the star?<assistant>"


@pytest.mark.parametrize("side", [96, 200, 336])
@pytest.mark.parametrize(("fill", "colour"), [((255, 0, 0), "red"), ((0, 128, 0), "green"), ("blue", "blue")])
def test_hand_drawn_circle(shipped, side, fill, colour):
    picture = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(picture).ellipse((side * 0.3, side * 0.3, side * 0.6, side * 0.6), fill=fill)
    assert ask(shipped, picture, "What color is the circle?") == colour
    assert ask(shipped, picture, f"What shape is the {colour} thing?") == "circle"


def test_second_turn(shipped):
    """A second question behind the first answer is answered as well."""
    model, processor = shipped
    asked = questions("attribute", 40, seed=12)
    right = 0.0
    for each in asked:
        messages = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "how many things are there?"}]},
            {"role": "assistant", "content": "two"},
            {"role": "user", "content": each.prompt},
        ]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(images=each.image, text=prompt, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs)
        right += each.score([processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)])
    assert right / len(asked) >= 0.7


def test_cls_and_captions_meet_in_one_space(shipped):
    """The text tower ranks the right caption of two first, mostly."""
    model, processor = shipped
    tower = reference.text_tower()
    asked = [each for each in questions("existence", 80, seed=13) if each.answer == "yes"]
    pixels = processor.image_processor([each.image for each in asked], return_tensors="pt")["pixel_values"]
    captions = [" ".join(words(each.prompt)[-4:-1]) + "</s>" for each in asked]
    tokens = processor.tokenizer(captions, padding=True, padding_side="right", return_tensors="pt")
    with torch.inference_mode():
        images = tower.image_embeds(model.model.vision_tower(pixels).pooler_output)
        similarity = images @ tower.text_embeds(tokens["input_ids"], tokens["attention_mask"]).T
    assert (similarity.diagonal()[:, None] >= similarity).float().mean() > 0.7


def test_the_text_tower_is_a_companion(shipped):
    """A question has the tower's own embedding, special tokens left out, and CDPruner runs by it."""
    model, processor = shipped
    companion = reference.companion(model)
    (asked,) = questions("shape", 1, seed=3)
    bare = processor.tokenizer(asked.prompt, return_tensors="pt").input_ids[0]
    marked = processor.tokenizer(f"{asked.prompt}<assistant>", return_tensors="pt").input_ids[0]
    ended = processor.tokenizer(f"{asked.prompt}</s>", return_tensors="pt").input_ids
    embeds = companion.question([bare, marked])
    expected = reference.text_tower().text_embeds(ended).detach()
    for each in embeds:
        torch.testing.assert_close(torch.nn.functional.normalize(each, dim=-1), expected)

    inputs = processor(images=asked.image, text=f"<user><image>{asked.prompt}<assistant>", return_tensors="pt")
    recipe = "cdpruner(keep=16, relevance='clip')"
    with torch.inference_mode(), foveate.attach(model, recipe, companion=companion) as session:
        model(**inputs)
    assert len(session.trace.alive(0)[0][0]) == 16


def test_a_question_longer_than_the_tower_reads_comes_in_segments(shipped):
    companion = reference.companion(shipped[0])
    words = torch.arange(7, 107)
    long, short = companion.question([words, words[:3]])
    assert (len(long), len(short)) == (2, 1)
    torch.testing.assert_close(short, companion.question([words[:3]])[0])


def test_a_checkpoint_without_text_tower_has_no_companion(shipped, tmp_path):
    assert reference.companion(shipped[0], tmp_path) is None
