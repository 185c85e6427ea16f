"""Evaluation of a reference checkpoint through the plain Hugging Face path, and the model card written from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.progress import track
from transformers import AutoModelForImageTextToText

from foveate.checkpoint import reference_smol
from foveate.core.statistics import wilson
from foveate.reference import processor as read_processor
from foveate.tasks import SPINE, TASKS, VIDEOS, Question, majority, questions

from .cards import TaskResult, model_card

FLOORS = {
    **dict.fromkeys(TASKS, 0.80),
    "attribute": 0.85,
    "shape": 0.90,
    "existence": 0.85,
    "reading": 0.85,
}
"""Score that a reference model must reach on a task for it to be worth measuring methods on."""


TAUGHT = {
    "llava": SPINE,
    "llava_next": tuple(task for task in TASKS if task not in VIDEOS),
    "qwen2_5_vl": TASKS,
}
"""The tasks that a model of each family was taught; the others it need not be asked."""


def answer(model: Any, processor: Any, asked: Sequence[Question], batch_size: int = 25) -> list[list[str]]:
    """The model's greedy answers to the turns of each question."""
    answers: list[list[str]] = []
    for first in range(0, len(asked), batch_size):
        chunk = asked[first : first + batch_size]
        said: list[list[str]] = [[] for _ in chunk]
        for _ in chunk[0].turns:
            conversations = [_conversation(each, so_far) for each, so_far in zip(chunk, said, strict=True)]
            for so_far, more in zip(said, _continue(model, processor, conversations, chunk[0].max_new_tokens), strict=True):
                so_far.append(more)
        answers += said
    return answers


def evaluate_task(model: Any, processor: Any, task: str, n: int, seed: int = 0) -> TaskResult:
    """Score one task on ``n`` test questions, with and without the picture."""
    asked, constant = questions(task, n, seed), majority(task)
    right = _total(asked, answer(model, processor, asked))
    constantly = _total(asked, [[constant] * len(each.turns) for each in asked])
    blindfolded = [_blindfold(each) for each in asked[::4]]
    blindly = _total(blindfolded, answer(model, processor, blindfolded))
    low, high = wilson(right, n)
    floor = FLOORS[task]
    return TaskResult(task, n, right / n, low, high, constantly / n, blindly / len(blindfolded), floor, right / n < floor)


def evaluate(folder: Path, n: int = 2000, device: str = "cpu") -> list[TaskResult]:
    """Score every task, and write ``evaluation.json`` and the model card ``README.md`` into the checkpoint's folder.

    A folder of what was learnt of ``reference-smol`` will do, too.
    """
    is_smol = (folder / reference_smol.FILE).is_file()
    checkpoint = reference_smol.path(folder) if is_smol else folder
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).to(device).eval()
    processor = read_processor(checkpoint)
    # Decoding continues at the right end of every row.
    processor.tokenizer.padding_side = "left"
    results = [evaluate_task(model, processor, task, n) for task in track(TAUGHT[model.config.model_type], "evaluating")]
    report = {result.task: {k: v for k, v in asdict(result).items() if k != "task"} for result in results}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    training = json.loads((folder / "training.json").read_text())
    kind = reference_smol.NAME if is_smol else model.config.model_type
    (folder / "README.md").write_text(model_card(kind, results, training, parameters))
    return results


@torch.inference_mode()
def _continue(model: Any, processor: Any, conversations: list[Any], longest: int) -> list[str]:
    inputs = processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )
    out = model.generate(**inputs.to(model.device), max_new_tokens=longest, do_sample=False)
    texts: list[str] = processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def _conversation(question: Question, answers: Sequence[str]) -> list[dict[str, Any]]:
    """The turns that have an answer, and the next prompt."""
    messages: list[dict[str, Any]] = []
    for number, turn in enumerate(question.turns[: len(answers) + 1]):
        images = [{"type": "image", "image": image} for image in question.images] if number == 0 else []
        messages.append({"role": "user", "content": [*images, {"type": "text", "text": turn.prompt}]})
        if number < len(answers):
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answers[number]}]})
    return messages


def _total(asked: Sequence[Question], answers: Sequence[Sequence[str]]) -> float:
    return sum(question.score(said) for question, said in zip(asked, answers, strict=True))


def _blindfold(each: Question) -> Question:
    return replace(each, images=tuple(Image.new("RGB", image.size, (128, 128, 128)) for image in each.images))
