"""Evaluation of a reference checkpoint through the plain Hugging Face path, and the model card written from it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaForConditionalGeneration, LlavaProcessor

from saccade.core.statistics import wilson
from saccade.tasks import SPINE, Question, majority, question

FLOORS = {
    "attribute": 0.85,
    "shape": 0.90,
    "existence": 0.85,
    "counting": 0.80,
    "position": 0.80,
    "reading": 0.85,
}
"""Accuracy that the reference model must reach on each task to be worth measuring methods on."""


@dataclass(frozen=True)
class TaskResult:
    """Share of right answers on ``questions`` held-out questions, with a 95 % Wilson interval, beside what needs no eyes.

    ``majority``: the best constant answer; ``blind``: the same model shown a grey picture (a quarter of the questions).
    """

    task: str
    questions: int
    score: float
    low: float
    high: float
    majority: float
    blind: float
    floor: float
    below_floor: bool


def answer(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, asked: Sequence[Question], batch_size: int = 50
) -> list[str]:
    """The model's greedy answers."""
    answers: list[str] = []
    for first in range(0, len(asked), batch_size):
        chunk = asked[first : first + batch_size]
        prompts = [
            processor.apply_chat_template(
                [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": each.prompt}]}],
                add_generation_prompt=True,
            )
            for each in chunk
        ]
        inputs = processor(images=[each.image for each in chunk], text=prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**inputs.to(model.device), max_new_tokens=6, do_sample=False)
        answers += processor.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return answers


def evaluate_task(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, task: str, n: int, seed: int = 0
) -> TaskResult:
    """Score one task on ``n`` test questions, with and without the picture."""
    constant = majority(task)
    right = blindly = constantly = 0.0
    blind = 0
    for first in range(0, n, 200):
        asked = [question(task, seed, index) for index in range(first, min(first + 200, n))]
        right += sum(each.score([said]) for each, said in zip(asked, answer(model, processor, asked), strict=True))
        constantly += sum(each.score([constant]) for each in asked)
        blindfolded = [_blindfold(each) for each in asked[::4]]
        said = answer(model, processor, blindfolded)
        blindly += sum(each.score([one]) for each, one in zip(blindfolded, said, strict=True))
        blind += len(blindfolded)
    low, high = wilson(right, n)
    floor = FLOORS[task]
    return TaskResult(task, n, right / n, low, high, constantly / n, blindly / blind, floor, right / n < floor)


def evaluate(folder: Path, n: int = 2000, device: str = "cpu") -> list[TaskResult]:
    """Score every task, and write ``evaluation.json`` and the model card ``README.md`` into the checkpoint's folder."""
    model = AutoModelForImageTextToText.from_pretrained(folder).to(device).eval()
    processor = AutoProcessor.from_pretrained(folder)
    results = [evaluate_task(model, processor, task, n) for task in tqdm(SPINE)]
    report = {result.task: {k: v for k, v in asdict(result).items() if k != "task"} for result in results}
    (folder / "evaluation.json").write_text(json.dumps(report, indent=2) + "\n")
    parameters = sum(parameter.numel() for parameter in model.parameters())
    training = json.loads((folder / "training.json").read_text())
    (folder / "README.md").write_text(model_card(results, training, parameters))
    return results


def model_card(results: Sequence[TaskResult], training: dict[str, object], parameters: int) -> str:
    """The model card in Markdown."""
    rows = "\n".join(
        f"| {r.task} | **{r.score:.1%}** | {r.low:.1%} to {r.high:.1%} | {r.majority:.1%} | {r.blind:.1%} | {r.floor:.0%} | "
        f"{'below floor' if r.below_floor else 'met'} |"
        for r in results
    )
    return _CARD.format(questions=results[0].questions, rows=rows, parameters=parameters / 1e6, **training)


def _blindfold(each: Question) -> Question:
    grey = Image.new("RGB", each.image.size, (128, 128, 128))
    return replace(each, images=(grey,))


_CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---
# Saccade reference model

A LLaVA (CLIP vision tower, two-layer projector, Llama decoder) with {parameters:.1f} M parameters, trained from scratch on
synthetic scenes, so that methods which remove visual tokens can be measured on a real model without a download or a GPU.
It answers questions about up to six coloured shapes and a three-letter sign, and nothing else.
This page is written by `python -m saccade.reference evaluate`.

## Accuracy
Share of right answers on {questions:,} held-out questions per task (disjoint seed streams), greedy decoding in float32;
95 % Wilson intervals. *Majority* is the best constant answer, *blind* the same model shown a grey picture
(a quarter of the questions).

| task | accuracy | interval | majority | blind | floor | |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

*attribute*: what colour is the star? *shape*: what shape is the red thing? *existence*: is there a red star (half no,
mostly with colour and shape both present). *counting*: how many stars, red things, things. *position*: in which cell of the
12 x 12 patch grid is the centre of a thing; right when row and column are each within one. *reading*: the sign, letter by
letter.

## Data
Scenes of 96 x 96 pixels from a seeded generator: one to six shapes that do not overlap (eight shapes, eight colours with
varied values, 12 to 62 pixels), plain or noisy, light or dark ground, a three-letter sign in 40 % (in all, for *reading*).

## Training
{minutes:.0f} minutes on {machine} that had other work to do: {steps:,} steps, {images:,} pictures (with about ten questions
each, once the decoder trains), bfloat16 autocast, Muon and AdamW. The encoder alone first, then small windows of the patch
grid, then all of it; last, for 300 steps, mostly windows whose patches take any ascending positions in the decoder, so that
location travels in the features and survives a method that renumbers tokens. Auxiliary losses: projected patches should read
as the words for what they show and where, early patches should know which of their pixels are figure, and the vision tower's
CLS token should match a caption of the scene (`text_tower/`). Auxiliary heads are not part of the checkpoint.
Reproduce with `saccade reference train --folder runs/reference --seed {seed}`.
"""
