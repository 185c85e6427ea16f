"""The same questions to vLLM under a recipe, and to transformers under `foveate.attach`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine in this process, so that its model can be seen
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # a core that others use, too, would be waited for
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from transformers import AutoModelForImageTextToText
from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

import foveate
from foveate.models.processors import read_processor
from foveate.models.specimens import SHAPES
from foveate.serving.vllm.admission import Pruning
from foveate.serving.vllm.model import Pruner
from foveate.tasks import Question
from tests.hub import write_checkpoint

LONGEST = 8
"""Tokens of an answer."""


@dataclass
class Answer:
    """An answer, token by token.

    logprobs: of each token. kept: what was kept of each picture's views. cached: tokens of the prompt that were in the
        prefix cache. steps: what the method saw and did, in whose batch this is ``row``.
    """

    ids: list[int]
    logprobs: list[float]
    kept: list[list[int]]
    cached: int = 0
    steps: tuple[Any, ...] = ()
    row: int = 0


def engine(folder: Any, recipe: str | None, min_keep: Any = None, max_keep: Any = None, **options: Any) -> LLM:
    """vLLM on a checkpoint, in float32."""
    overrides = {} if recipe is None else {"foveate": {"recipe": recipe, "min_keep": min_keep, "max_keep": max_keep}}
    known = dict(dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=16, seed=0, disable_log_stats=True)
    return LLM(str(folder), hf_overrides=overrides, **(known | options))


def stop(llm: LLM) -> None:
    """End an engine, so that another may start in this process."""
    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def change(llm: LLM, recipe: str) -> None:
    """Go on under another recipe, as a server that was started with it would."""
    processor = llm.llm_engine.renderer.get_mm_processor()
    config = processor.info.get_hf_config()
    config.foveate = {"recipe": recipe}
    processor.pruning = Pruning.of(processor.info.family, config)

    def install(model: Any) -> None:
        model.pruner = Pruner(Pruning.of(model.family, config), model.pruner.anatomy, model.pruner.most)

    llm.apply_model(install)


def prompt(processor: Any, question: Question) -> str:
    """As text, with one placeholder for each picture."""
    content = [{"type": "image"} for _ in question.images] + [{"type": "text", "text": question.turns[0].prompt}]
    text: str = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    return text


def watch(llm: LLM) -> list[list[list[int]]]:
    """A list to which what is kept of each picture's views is added from now on, in the order of their encoding."""
    seen: list[list[list[int]]] = []

    def install(model: Any) -> None:
        pruner, plain = model.pruner, type(model.pruner).encode

        def encode(keeps: Any, bound: Any, *rest: Any) -> Any:
            made = plain(pruner, keeps, bound, *rest)
            for picture, (_, place) in zip(pruner.pruning.pictures(bound), made):
                seen.append(_by_view(picture, place))
            return made

        pruner.encode = encode

    llm.apply_model(install)
    return seen


def toy(family: str, folder: Path) -> Path:
    """A random checkpoint of a family, with heads as wide as vLLM's attention on CPUs takes them."""
    shape = deepcopy(SHAPES[family])
    shape["text_config"] |= {"head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    if family == "llava_onevision":  # whose decoder has no head_dim of its own
        shape["text_config"]["hidden_size"] = 128
    if "mrope_section" in shape["text_config"].get("rope_parameters", {}):
        shape["text_config"]["rope_parameters"]["mrope_section"] = [16, 8, 8]
    return write_checkpoint(family, folder, shape=shape)


def _by_view(picture: Any, place: torch.Tensor) -> list[list[int]]:
    columns = torch.tensor([view.columns for view in picture.views])
    ordinal = place[:, 1] * columns[place[:, 0].clamp(min=0)] + place[:, 2]
    return [ordinal[place[:, 0] == number].tolist() for number in range(len(picture.views))]


def ask(
    llm: LLM, processor: Any, asked: Sequence[Question], keeps: Sequence[Any] = (), longer: int | None = None, **more: Any
) -> list[Answer]:
    """vLLM's answers, asked all at once, at the ``keeps`` of each; what was kept has to be asked of `watch`.

    ``longer``: tokens of each answer, whatever ends it; None = as `attached`.
    """
    requests = [
        {"prompt": prompt(processor, each), "multi_modal_data": {"image": list(each.images)}}
        | ({"mm_processor_kwargs": {"foveate_keep": keeps[number]}} if keeps else {})
        | {name: value[number] for name, value in more.items()}
        for number, each in enumerate(asked)
    ]
    params = SamplingParams(temperature=0.0, max_tokens=longer or LONGEST, ignore_eos=longer is not None, logprobs=1)
    answers = []
    for made in llm.generate(requests, params, use_tqdm=False):
        out = made.outputs[0]
        logprobs = [step[i].logprob for step, i in zip(out.logprobs, out.token_ids)]
        answers.append(Answer(list(out.token_ids), logprobs, [], made.num_cached_tokens or 0))
    return answers


def same(ours: Sequence[Answer], theirs: Sequence[Answer], kept: Sequence[Any] | None = None) -> None:
    """Answers are equal, token by token and in probability, and so is what was ``kept`` of each picture."""
    assert [answer.ids for answer in ours] == [answer.ids for answer in theirs]
    for one, other in zip(ours, theirs):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    if kept is not None:
        assert [view for picture in kept for view in picture] == [view for answer in theirs for view in answer.kept]


@torch.inference_mode()
def attached(folder: Any, recipe: str, asked: Sequence[Question], dtype: str = "float32", at_once: int = 1) -> list[Answer]:
    """transformers' answers under `foveate.attach`, ``at_once`` questions in a batch."""
    model, processor = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype).eval(), read_processor(folder)
    end = model.generation_config.eos_token_id
    answers = []
    with foveate.attach(model, recipe) as session:
        session.watch()
        for start in range(0, len(asked), at_once):
            batch = asked[start : start + at_once]
            shown = [list(each.images) for each in batch]
            texts = [prompt(processor, each) for each in batch]
            padded: Any = {} if len(batch) == 1 else {"padding": True, "padding_side": "left"}
            inputs = processor(images=shown, text=texts, return_tensors="pt", **padded).to(model.dtype)
            made = model.generate(
                **inputs, max_new_tokens=LONGEST, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
            alive, steps = session.trace.alive(0), tuple(session.trace.steps)
            for row, tokens in enumerate(made.sequences[:, inputs["input_ids"].shape[1] :].tolist()):
                ids = tokens[: tokens.index(end) + 1] if end in tokens else tokens
                logprobs = [logits[row].log_softmax(0)[i].item() for logits, i in zip(made.logits, ids)]
                answers.append(Answer(ids, logprobs, [of.tolist() for of in alive[row]], steps=steps, row=row))
    return answers
