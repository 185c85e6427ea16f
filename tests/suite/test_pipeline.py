"""transformers' own pipeline over an attached model: what it answers is what the model generates under the recipe."""

from __future__ import annotations

from threading import Thread
from typing import Any

import pytest
from transformers import TextIteratorStreamer, pipeline

import foveate
from foveate import reference, tasks

RECIPE = "hiprune(keep=36) + fastv(layer=2, keep=20) + snapkv(keep=0.5, window=8)"
QUESTIONS = tasks.questions("attribute", n=3, seed=0)


@pytest.fixture(scope="module", params=["reference", "reference-qwen"])
def pipe(request: pytest.FixtureRequest) -> Any:
    if not reference.path(request.param).is_dir():
        pytest.skip(f"{request.param} is not there")
    model, processor = reference.load(request.param)
    return pipeline("image-text-to-text", model=model, processor=processor)


def chat(question: Any) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": question.image}, {"type": "text", "text": question.prompt}]
    return [{"role": "user", "content": content}]


def text(answers: Any) -> str:
    """The pipeline leaves the space between prompt and answer."""
    return answers[0]["generated_text"].strip()


def generated(pipe: Any, messages: Any) -> str:
    """What the model itself answers."""
    inputs = pipe.processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    out = pipe.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return pipe.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_chats_one_by_one_and_in_a_batch(pipe: Any) -> None:
    chats = [chat(question) for question in QUESTIONS]
    with foveate.attach(pipe.model, RECIPE) as session:
        expected = [generated(pipe, messages) for messages in chats]
        alone = [pipe(text=messages, max_new_tokens=6, return_full_text=False, do_sample=False) for messages in chats]
        batch = pipe(text=chats, max_new_tokens=6, return_full_text=False, do_sample=False, batch_size=3)
    assert [text(answers) for answers in alone] == expected
    assert [text(answers) for answers in batch] == expected
    assert session.report.visual_tokens[-1] == 20


def test_plain_text_with_a_placeholder(pipe: Any) -> None:
    question = QUESTIONS[0]
    prompt = pipe.processor.apply_chat_template(chat(question), add_generation_prompt=True)
    with foveate.attach(pipe.model, RECIPE):
        said = pipe(images=question.image, text=prompt, max_new_tokens=6, return_full_text=False, do_sample=False)
        assert text(said) == generated(pipe, chat(question))


def test_streaming_from_a_thread(pipe: Any) -> None:
    messages = chat(QUESTIONS[1])
    streamer = TextIteratorStreamer(pipe.processor.tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=60)
    with foveate.attach(pipe.model, RECIPE) as session:
        expected = generated(pipe, messages)
        asked = Thread(
            target=pipe,
            kwargs=dict(text=messages, max_new_tokens=6, generate_kwargs=dict(streamer=streamer, do_sample=False)),
        )
        asked.start()
        said = "".join(streamer)
        asked.join()
    assert said == expected
    assert session.report.decode_steps > 0


def test_a_second_turn_reads_the_first(pipe: Any) -> None:
    with foveate.attach(pipe.model, RECIPE):
        first = pipe(text=chat(QUESTIONS[2]), max_new_tokens=6, do_sample=False)[0]["generated_text"]
        assert first[-1]["role"] == "assistant"
        more = [*first, {"role": "user", "content": [{"type": "text", "text": QUESTIONS[0].prompt}]}]
        second = pipe(text=more, max_new_tokens=6, return_full_text=False, do_sample=False)
        told = [*first[:-1], {"role": "assistant", "content": [{"type": "text", "text": first[-1]["content"]}]}, more[-1]]
        assert text(second) == generated(pipe, told)


def test_the_pipeline_outlives_the_session(pipe: Any) -> None:
    messages = chat(QUESTIONS[0])
    plain = pipe(text=messages, max_new_tokens=6, return_full_text=False, do_sample=False)
    with foveate.attach(pipe.model, "hiprune(keep=1)"):
        pipe(text=messages, max_new_tokens=6, return_full_text=False, do_sample=False)
    assert pipe(text=messages, max_new_tokens=6, return_full_text=False, do_sample=False) == plain
