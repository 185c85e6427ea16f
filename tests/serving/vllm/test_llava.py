"""LLaVA: answers as under `foveate.attach`, keeps by request, refusals, methods that fail, and caches that servers share."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from prometheus_client import REGISTRY

from foveate import reference
from foveate.methods.before_llm.hiprune import HiPrune
from foveate.methods.before_llm.uniform import stratified
from foveate.models.processors import read_processor
from foveate.serving.ticket import draw, redeem
from foveate.tasks import SPINE, questions
from tests.serving.vllm.both import ask, attached, engine, same, stop, watch

FOLDER = reference.path("reference")
RECIPE = "hiprune(keep=32)"
ASKED = [each for task in SPINE for each in questions(task, 2, seed=5)]


@pytest.fixture(scope="module")
def processor():
    return read_processor(FOLDER)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return tmp_path_factory.mktemp("store")


def serve(recipe: str, store: Path):
    shared = {
        "ec_connector": "ECExampleConnector",
        "ec_role": "ec_both",
        "ec_connector_extra_config": {"shared_storage_path": str(store)},
    }
    return engine(FOLDER, recipe, min_keep=8, max_keep=72, ec_transfer_config=shared)


def metric(name: str, recipe: str = RECIPE) -> float:
    return REGISTRY.get_sample_value(name, {"recipe": recipe}) or 0.0


class TestOneRecipe:
    """The server that is asked first."""

    @pytest.fixture(scope="class")
    def llm(self, store):
        llm = serve(RECIPE, store)
        yield llm
        stop(llm)

    def test_answers_and_what_is_kept_are_those_of_transformers(self, llm, processor):
        before, after = metric("foveate_visual_tokens_before_total"), metric("foveate_visual_tokens_after_total")
        # Dummies by which memory was measured are not counted.
        assert before == after == 0
        kept = watch(llm)
        same(ask(llm, processor, ASKED), attached(FOLDER, RECIPE, ASKED), kept)
        assert metric("foveate_visual_tokens_before_total") == 144 * len(ASKED)
        assert metric("foveate_visual_tokens_after_total") == 32 * len(ASKED)
        assert metric("foveate_scoring_seconds_count") > 0

    def test_keeps_differ_within_a_batch(self, llm, processor):
        asked = [each for each in ASKED[:4] for _ in range(2)]
        ours = ask(llm, processor, asked, keeps=[16, 0.5] * 4)
        theirs = [attached(FOLDER, f"hiprune(keep={keep})", ASKED[:4]) for keep in (16, 0.5)]
        same(ours[::2], theirs[0])
        same(ours[1::2], theirs[1])

    def test_the_door_hears_what_a_cached_picture_had(self, llm, processor):
        ticket = draw()
        ask(llm, processor, ASKED[:1], mm_processor_kwargs=[{"foveate_ticket": ticket}])
        counts = redeem(ticket)
        assert (counts.before, counts.after) == (144, 32)

    def test_two_pictures_in_one_prompt(self, llm, processor):
        pairs = [replace(one, images=one.images + other.images) for one, other in zip(ASKED[::2], ASKED[1::2])]
        same(ask(llm, processor, pairs), attached(FOLDER, RECIPE, pairs))

    def test_identities_are_digests_and_enter_a_clients_own(self, llm, processor, store):
        before = set(store.iterdir())
        ask(llm, processor, ASKED[:1], multi_modal_uuids=[{"image": ["mine"]}])
        (new,) = set(store.iterdir()) - before
        assert len(new.name) == 64
        assert int(new.name, 16)

    @pytest.mark.parametrize(
        ("options", "reason"),
        [
            ({"foveate_keep": 144}, "144 of this picture's 144 tokens, but this server allows 8 to 72"),
            ({"foveate_keep": 4}, "4 of this picture's 144 tokens, but this server allows 8 to 72"),
            ({"foveate_keep": "full"}, "allows 8 to 72"),
            ({"foveate_keep": "some"}, "keep='some': must be a count, a share"),
            ({"foveate_keep": True}, "keep=True: must be a count, a share"),
            ({"size": {"height": 4000, "width": 4000}}, "options of the processor are the operator's"),
        ],
    )
    def test_what_is_not_the_clients_is_refused(self, llm, processor, options, reason):
        with pytest.raises(ValueError, match=reason):
            ask(llm, processor, ASKED[:1], mm_processor_kwargs=[options])

    def test_embeddings_of_pictures_are_refused(self, llm):
        request = {"prompt": "<image>", "multi_modal_data": {"image": torch.zeros(1, 144, 192)}}
        with pytest.raises(ValueError, match="image_embeds: nothing is known"):
            llm.generate([request], use_tqdm=False)

    def test_a_method_that_fails_gives_way_to_an_even_grid(self, llm, processor, monkeypatch):
        def failing(*args):
            raise RuntimeError("on purpose")

        monkeypatch.setattr(HiPrune, "select", failing)
        kept, asked = watch(llm), questions("shape", 3, seed=77)
        before = metric("foveate_method_failures_total")
        answers = ask(llm, processor, asked)
        assert [len(answer.ids) > 0 for answer in answers] == [True] * 3
        assert kept == [[stratified(12, 12, 32).tolist()]] * 3
        assert metric("foveate_method_failures_total") == before + 3


class TestAnotherRecipe:
    """A second server on the same store of encodings."""

    RECIPE = "scope(keep=32)"

    @pytest.fixture(scope="class")
    def llm(self, store):
        llm = serve(self.RECIPE, store)
        yield llm
        stop(llm)

    def test_another_recipes_pictures_are_encoded_anew_and_ones_own_are_found(self, llm, processor, store):
        before = set(store.iterdir())
        assert len(before) > len(ASKED)
        uuids = [{"image": ["mine"]} for _ in ASKED[:1]] + [{"image": [None]} for _ in ASKED[1:]]
        kept = watch(llm)
        theirs = attached(FOLDER, self.RECIPE, ASKED)
        same(ask(llm, processor, ASKED, multi_modal_uuids=uuids), theirs, kept)
        assert len(kept) == len(ASKED)
        assert len(set(store.iterdir()) - before) == len(ASKED)
        # Nothing in memory: what comes now comes from the store.
        llm.llm_engine.reset_encoder_cache()
        llm.reset_prefix_cache()
        same(ask(llm, processor, ASKED, multi_modal_uuids=uuids), theirs)
        assert len(kept) == len(ASKED)

    def test_one_picture_at_two_keeps(self, llm, processor):
        kept = watch(llm)
        ask(llm, processor, [ASKED[0]] * 2, keeps=[16, 24])
        assert [len(view) for picture in kept for view in picture] == [16, 24]
