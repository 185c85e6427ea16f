"""Qwen2.5-VL: kept tokens stand where they stood, in chunks of prompts, out of the prefix cache, and after preemption."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from prometheus_client import REGISTRY
from vllm import SamplingParams

from foveate import reference
from foveate.methods.before_llm.hiprune import HiPrune
from foveate.models.processors import read_processor
from foveate.tasks import SPINE, questions
from tests.serving.vllm.both import ask, attached, engine, same, stop, watch

FOLDER = reference.path("reference-qwen")
RECIPE = "hiprune(keep=0.5)"
LARGE = [
    replace(each, images=tuple(image.resize((192, 192)) for image in each.images))
    for task in SPINE
    for each in questions(task, 1, seed=5)
]
ASKED = LARGE + [each for task in SPINE for each in questions(task, 1, seed=6)]
"""Pictures of 72 kept tokens, and of 18."""


@pytest.fixture(scope="module")
def llm():
    # A step computes 48 tokens at most, and the cache has room for four prompts of larger pictures.
    options = dict(max_num_batched_tokens=48, block_size=32, num_gpu_blocks_override=13)
    llm = engine(FOLDER, RECIPE, max_model_len=384, **options)
    yield llm
    stop(llm)


@pytest.fixture(scope="module")
def processor():
    return read_processor(FOLDER)


def test_chunks_that_cut_a_picture(llm, processor):
    kept = watch(llm)
    same(ask(llm, processor, ASKED), attached(FOLDER, RECIPE, ASKED))
    assert {len(view) for picture in kept for view in picture} == {18, 72}


def test_prompts_that_are_preempted_go_on_as_if_they_had_been_alone(llm, processor):
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempted, plain = [], scheduler._preempt_request

    def preempt(request, *args, **kwargs):
        preempted.append(request.request_id)
        return plain(request, *args, **kwargs)

    scheduler._preempt_request = preempt
    together = ask(llm, processor, LARGE, longer=40)
    assert preempted
    same(together, [ask(llm, processor, [each], longer=40)[0] for each in LARGE])


def test_the_prefix_cache_is_hit_within_a_picture(llm, processor):
    llm.reset_prefix_cache()
    first = ask(llm, processor, LARGE[:1])
    again = ask(llm, processor, LARGE[:1])
    assert first[0].cached == 0
    assert 0 < again[0].cached < 72  # the rest of the picture is computed anew
    same(again, first)
    same(first, attached(FOLDER, RECIPE, LARGE[:1]))


def test_keeps_differ_within_a_batch(llm, processor):
    asked = [each for each in LARGE[:2] for _ in range(3)]
    ours = ask(llm, processor, asked, keeps=[16, 0.3, "full"] * 2)
    for number, keep in enumerate((16, 0.3, 1.0)):
        same(ours[number::3], attached(FOLDER, f"hiprune(keep={keep})", LARGE[:2]))


def test_a_method_that_has_nothing_to_drop_is_not_asked(llm, processor, monkeypatch):
    def asked(*args):
        raise AssertionError("about a picture that stays whole")

    monkeypatch.setattr(HiPrune, "select", asked)
    fresh, failures = ASKED[len(LARGE) :][:2], partial(REGISTRY.get_sample_value, "foveate_method_failures_total")
    before = failures({"recipe": RECIPE})
    same(ask(llm, processor, fresh, keeps=[1.0, 36]), attached(FOLDER, "none", fresh))
    assert failures({"recipe": RECIPE}) == before


def test_two_pictures_of_two_sizes_in_one_prompt(llm, processor):
    pairs = [replace(one, images=one.images + other.images) for one, other in zip(LARGE, ASKED[len(LARGE) :])]
    kept = watch(llm)
    theirs = attached(FOLDER, RECIPE, pairs[:3])
    same(ask(llm, processor, pairs[:3]), theirs)
    assert {len(view) for picture in kept for view in picture} <= {18, 72}


def test_videos_stay_whole_and_stand_where_they_stood(llm, processor):
    frames = np.stack([np.asarray(each.images[0]) for each in ASKED[len(LARGE) :][:4]])
    text = "<user> <vision><video></vision> what colour is the star ? <assistant>"
    about = {"fps": 2.0, "duration": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "do_sample_frames": False}
    request = {"prompt": text, "multi_modal_data": {"video": [(frames, about)]}}
    (made,) = llm.generate([request], SamplingParams(temperature=0.0, max_tokens=4, logprobs=1), use_tqdm=False)
    assert len(made.prompt_token_ids) > 2 * 36  # two frames of a grid each, whole
    ours = [step[i].logprob for step, i in zip(made.outputs[0].logprobs, made.outputs[0].token_ids)]
    llm.apply_model(lambda model: setattr(model, "pruner", None))
    llm.llm_engine.renderer.get_mm_processor().pruning = None
    llm.reset_prefix_cache()
    llm.llm_engine.reset_encoder_cache()
    (plain,) = llm.generate([request], SamplingParams(temperature=0.0, max_tokens=4, logprobs=1), use_tqdm=False)
    assert plain.outputs[0].token_ids == made.outputs[0].token_ids
    assert ours == [step[i].logprob for step, i in zip(plain.outputs[0].logprobs, plain.outputs[0].token_ids)]
