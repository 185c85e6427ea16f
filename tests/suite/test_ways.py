"""Ways of calling a model, under every mechanism: beams, candidates, labels, turns, one session after another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator

import foveate
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.method import Cache, Method
from foveate.engine.session import Session
from foveate.methods.kv_cache.prefixkv import evicted
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import fed_lengths, generate, logits
from tests.suite.oracle import Notes, masked_logits, noting
from tests.suite.pairs import artifacts, refusal, variants

LLAVA = BODIES["llava-clip"]
CLOSE = dict(rtol=1e-4, atol=1e-4)
EXACT = dict(rtol=1e-6, atol=1e-6)
ENTRY = 2 * 2 * 12 * 4
"""Bytes of a cached token in a layer of LLAVA: keys and values of two heads of twelve floats."""

MERGED = "folder(keep=6)"
BLOCKS = "mixkv(keep=0.5, host='adakv', window=4)"
VIEW = "sparsevila(keep=6, decode_keep=0.5)"
STEPS = "prefixkv(keep=0.5, distance=-4)"
FACTORS = "attentionpack(rank=6, grouping='prompt')"
FEW = "kivi(size=8, residual=4)"
RECIPES = [
    MERGED,
    "prumerge(plus=True)",
    "ppe(keep=0.45)",
    BLOCKS,
    VIEW,
    STEPS,
    FACTORS,
    FEW,
    "alvts(keep=0.4)",
    "hidrop(late_entry=2, layer_list=(2,), keep_list=(6,), early_exit=4)",
    "ivc_prune",
]


@dataclass(frozen=True)
class Composition:
    """A recipe of several systems, and what each of them does.

    Attributes:
        recipe: the recipe.
        visual, active: visual tokens that enter each layer, and rows that run through it, of the prompt with the image.
        entries: cached tokens of each layer in bytes of one, after the answers to the image, to a text, to another text.
        again: the same where the second turn brings another image.
    """

    recipe: str
    visual: tuple[int, ...]
    active: tuple[int, ...]
    entries: tuple[tuple[int, ...], ...]
    again: tuple[tuple[int, ...], ...]


COMPOSITIONS = [
    # The whole cache is set aside (17 of the prompt, later answers and questions) beside what decoding reads.
    Composition(
        f"folder(keep=9) + {VIEW}",
        (6, 6, 6, 6),
        (17, 17, 17, 17),
        ((34,) * 4, (52,) * 4, (70,) * 4),
        ((34,) * 4, (69,) * 4, (87,) * 4),
    ),
    Composition(
        "hiprune(keep=9) + v2drop(layers=(1, 3), ratios=(0.5, 0.4)) + mixkv(keep=0.5, window=4)",
        (9, 4, 4, 1),
        (20, 15, 15, 12),
        ((13, 10, 10, 9), (22, 19, 19, 18), (31, 28, 28, 27)),
        ((13, 10, 10, 9), (35, 27, 27, 23), (44, 36, 36, 32)),
    ),
    # Decoding evicts: 22 are cut to 13, and for nine new tokens a turn three go. Another image's 21 rows and the 15 entries
    # that are there compete for 21 places.
    Composition(
        "prumerge(plus=True) + shortv(layers=(1,)) + prefixkv(keep=0.6, distance=-4)",
        (11, 11, 11, 11),
        (22, 11, 22, 22),
        ((15,) * 4, (21,) * 4, (27,) * 4),
        ((15,) * 4, (21,) * 4, (27,) * 4),
    ),
    # A block of 32 entries for each head, and what came later.
    Composition(
        f"tome(keep=8) + fastv(layer=2, keep=4) + {BLOCKS}",
        (8, 8, 4, 4),
        (19, 19, 15, 15),
        ((35,) * 4, (44,) * 4, (53,) * 4),
        ((35,) * 4, (56, 56, 52, 52), (65, 65, 61, 61)),
    ),
    Composition(
        "alvts + snapkv(window=4)",
        (5, 5, 5, 5),
        (16, 16, 16, 16),
        ((11,) * 4, (20,) * 4, (29,) * 4),
        ((11,) * 4, (29,) * 4, (38,) * 4),
    ),
    Composition(
        "hidrop + mixkv(window=4, keep=0.5)",
        (0, 16, 1, 0),
        (11, 27, 12, 11),
        ((8, 16, 9, 8), (17, 25, 18, 17), (26, 34, 27, 26)),
        ((8, 16, 9, 8), (21, 45, 23, 21), (30, 54, 32, 30)),
    ),
    # What goes before layer 2 goes from the caches of layers 0 and 1, too.
    Composition(
        f"ivc_prune + {STEPS}",
        (16, 16, 5, 5),
        (27, 27, 16, 16),
        ((10,) * 4, (16,) * 4, (22,) * 4),
        ((10,) * 4, (14,) * 4, (20,) * 4),
    ),
    Composition(
        f"shortv(layers=(1,)) + ivc_prune + {BLOCKS}",
        (16, 16, 5, 5),
        (27, 11, 16, 16),
        ((35,) * 4, (44,) * 4, (53,) * 4),
        ((35,) * 4, (52,) * 4, (61,) * 4),
    ),
]
compositions = pytest.mark.parametrize("composition", COMPOSITIONS, ids=lambda composition: composition.recipe)


def _pairs(recipes: list[str]) -> list[Any]:
    """Recipes on three bodies, as far as they host them; LLaVA in the first tier."""
    found = []
    for body in (LLAVA, BODIES["qwen2_5_vl"], BODIES["llava_next"]):
        for recipe in recipes:
            if all(refusal(method, body) is None for method in foveate.Recipe.of(recipe).methods):
                marks = [] if body is LLAVA else [pytest.mark.slow]
                found.append(pytest.param(recipe, body, id=f"{body.name}-{recipe}", marks=marks))
    return found


mechanisms = pytest.mark.parametrize(("recipe", "body"), _pairs(RECIPES))
first_variants = pytest.mark.parametrize(
    "method", [m for m in (variants(name)[0] for name in registry.methods()) if refusal(m, LLAVA) is None], ids=str
)


# One prompt, several answers.


@mechanisms
def test_beams_score_what_their_answers_score_one_by_one(recipe: str, body: Body) -> None:
    model, inputs = body.model(), body.inputs([(3, 1, 6), (2, 1, 4)])
    prompt = inputs["input_ids"].shape[1]
    with attach(model, recipe, body):
        output = generate(model, inputs, 6, num_beams=3, num_return_sequences=3, output_scores=True)
        answers = output.sequences[:, prompt:]
        told = torch.stack([forced(model, inputs, answers[place::3]) for place in range(3)], dim=1).flatten(0, 1)
    assert (output.beam_indices[:, 2:6] != output.beam_indices[:, 1:5]).any(), "no beam took over another one's cache"
    score = told.log_softmax(-1).gather(2, answers[..., None])[..., 0].mean(1)
    torch.testing.assert_close(output.sequences_scores, score, **CLOSE)


@mechanisms
def test_sampled_answers_are_those_of_the_seed_and_each_has_its_own_cache(recipe: str, body: Body) -> None:
    model, inputs = body.model(), body.inputs([(3, 1, 6), (2, 1, 4)])
    prompt = inputs["input_ids"].shape[1]
    with attach(model, recipe, body):
        drawn = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            drawn.append(generate(model, inputs, 6, do_sample=True, num_return_sequences=2))
        answers = drawn[0].sequences[:, prompt:]
        told = torch.stack([forced(model, inputs, answers[place::2]) for place in range(2)], dim=1).flatten(0, 1)
    assert torch.equal(drawn[0].sequences, drawn[1].sequences)
    assert not torch.equal(drawn[0].sequences, drawn[2].sequences)
    torch.testing.assert_close(logits(drawn[0]), told, **CLOSE)


@pytest.mark.parametrize("index", [[1, 1, 0], [0, 0, 1, 1]], ids=["selected", "repeated"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_lies_beside_keys_and_values_follows_the_samples(recipe: str, index: list[int]) -> None:
    model, inputs, words = LLAVA.model(), LLAVA.inputs([(3, 1, 6), (2, 1, 4)]), text(2, seed=1)["input_ids"]

    def told(samples: list[int]) -> Tensor:
        cache = model(**inputs, use_cache=True).past_key_values
        if samples == [0, 0, 1, 1]:
            cache.batch_repeat_interleave(2)
        else:
            cache.batch_select_indices(torch.tensor(samples))
        mask, outputs = inputs["attention_mask"][samples], []
        for ids in words[samples].split([1, 1, 1, 2], dim=1):  # steps of decoding, then a turn
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            outputs.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        return torch.cat(outputs, dim=1)

    with torch.no_grad(), attach(model, recipe):
        torch.testing.assert_close(told(index), told([0, 1])[index], **CLOSE)


# Candidates.


@pytest.mark.parametrize(
    ("recipe", "body"), [*_pairs([r for r in RECIPES if r != STEPS]), ("snapkv(window=4)", BODIES["gemma3"])]
)
def test_candidates_that_turn_out_wrong_leave_no_trace(recipe: str, body: Body, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = body.model(), body.inputs(ONE)
    with attach(model, recipe, body):
        plain = generate(model, inputs, 16)
        truth = plain.sequences

        def two_right_two_wrong(self: Any, ids: Tensor) -> tuple[Tensor, None]:
            following = truth[:, ids.shape[1] : ids.shape[1] + 4].clone()
            following[:, 2:] = 11 + (following[:, 2:] - 10) % (tiny.VOCABULARY - 11)
            return torch.cat([ids, following[:, : max(0, truth.shape[1] - ids.shape[1] - 1)]], dim=1), None

        monkeypatch.setattr(PromptLookupCandidateGenerator, "get_candidates", two_right_two_wrong)
        with fed_lengths(model) as fed:
            assisted = generate(model, inputs, 16, prompt_lookup_num_tokens=3)
    assert fed == [inputs["input_ids"].shape[1], 5, 5, 5, 5, 3]
    assert torch.equal(assisted.sequences, truth)
    torch.testing.assert_close(logits(assisted), logits(plain), **CLOSE)


@pytest.mark.parametrize("recipe", ["fastv(layer=1, keep=5)", "snapkv(window=4)", VIEW])
def test_candidates_from_the_prompt_are_not_read_as_a_part_of_it(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs([(6, 1, 9)])
    inputs["input_ids"][:, -2:] = inputs["input_ids"][:, 2:4]  # the end has occurred before, so there are candidates at once
    with attach(model, recipe):
        plain = generate(model, inputs, 12)
        with fed_lengths(model) as fed:
            assisted = generate(model, inputs, 12, prompt_lookup_num_tokens=3)
    assert fed[0] == inputs["input_ids"].shape[1]
    assert max(fed[1:]) > 1
    assert torch.equal(assisted.sequences, plain.sequences)


def test_candidates_are_refused_with_the_remedy_where_every_token_evicts() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with attach(model, STEPS):
        with fed_lengths(model) as fed, pytest.raises(FoveateError) as refused:
            generate(model, inputs, 4, prompt_lookup_num_tokens=3)
        assert str(refused.value) == (
            "assisted decoding: prefixkv evicts with every token, and what is gone cannot be taken back; "
            "leave out prompt_lookup_num_tokens and assistant_model"
        )
        assert fed == []
        generate(model, inputs, 4)


# Labels.


@first_variants
def test_the_loss_is_that_of_the_rows_alive_and_its_gradients_reach_the_encoder(method: Method) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    labels = inputs["input_ids"].masked_fill((inputs["input_ids"] == tiny.IMAGE) | (inputs["attention_mask"] == 0), -100)
    given = labels.clone()
    with attach(model, method) as session:
        output = model(**inputs, labels=labels)
    output.loss.backward()
    origin = session.trace.log[0][-1].origin
    alive = torch.stack([torch.isin(torch.arange(labels.shape[1]), rows) for rows in origin])[:, :-1]
    told = alive & (labels[:, 1:] != -100)
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1][told], labels[:, 1:][told])
    torch.testing.assert_close(output.loss, expected)
    for part in (model.model.multi_modal_projector, model.model.vision_tower):
        gradients = [p.grad for p in part.parameters() if p.grad is not None]
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert sum(gradient.abs().sum() for gradient in gradients) > 0
    assert torch.equal(labels, given)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("recipe", ["fastv", "hiprune", "shortv(layers=(1,))", "snapkv"])
def test_gradient_checkpointing_is_refused_with_the_remedy(recipe: str) -> None:
    model, inputs = LLAVA.model().train(), LLAVA.inputs(ONE)
    model.gradient_checkpointing_enable()
    with attach(model, recipe):
        with pytest.raises(FoveateError, match=r"gradient checkpointing: not possible under [^\n]*; turn it off$"):
            model(**inputs, labels=inputs["input_ids"])
        model.gradient_checkpointing_disable()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    model.gradient_checkpointing_enable()
    with attach(model, "none"):
        model(**inputs, labels=inputs["input_ids"]).loss.backward()


# Calls.


@pytest.mark.parametrize("recipe", ["none", MERGED, VIEW])
def test_pictures_that_came_to_no_prompt_are_forgotten(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with torch.no_grad(), attach(model, recipe):
        expected = model(**inputs).logits
        model.get_image_features(inputs["pixel_values"])
        assert torch.equal(model(**inputs).logits, expected)
        model.get_image_features(inputs["pixel_values"])
        torch.testing.assert_close(logits(generate(model, inputs, 1))[:, 0], expected[:, -1])


@first_variants
def test_without_a_cache_the_logits_are_the_same(method: Method) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    if isinstance(method, Cache):
        with attach(model, method), pytest.raises(FoveateError, match=f"use_cache=False: {method.name} compresses a cache"):
            model(**inputs, use_cache=False)
        return
    with torch.no_grad(), attach(model, method):
        cached, uncached = model(**inputs), model(**inputs, use_cache=False)
    assert cached.past_key_values is not None
    assert uncached.past_key_values is None
    assert torch.equal(cached.logits, uncached.logits)


@pytest.mark.parametrize(
    ("recipe", "body"), _pairs([*RECIPES, "index_preserving", *(composition.recipe for composition in COMPOSITIONS)])
)
def test_prompts_without_images_among_others_are_answered_as_alone(recipe: str, body: Body) -> None:
    samples = [(3, 1, 6), (2, 0, 9), (2, 2, 4)]
    model = body.model().double()
    with attach(model, recipe, body):
        together = logits(generate(model, double(body.inputs(samples)), 5))
        for place in range(3):
            alone = logits(generate(model, double(body.inputs(samples, only=place)), 5))
            torch.testing.assert_close(alone[0], together[place], **EXACT)


# Turns.


@compositions
@pytest.mark.parametrize("another", [False, True], ids=["text", "another image"])
def test_three_turns_on_one_cache(composition: Composition, another: bool) -> None:
    model, talk = LLAVA.model(), Talk(LLAVA.inputs(ONE, seed=2))
    with noting() as notes, attach(model, composition.recipe) as session:
        talk.answer(model)
        assert (session.report.visual_tokens, session.report.active) == (composition.visual, composition.active)
        held = [tuple(size / ENTRY for size in session.report.kv_bytes)]
        for turn in (1, 2):
            talk.ask(LLAVA.inputs([(2, 1, 5)], seed=3) if another and turn == 1 else text(1, seed=turn))
            talk.answer(model)
            held.append(tuple(size / ENTRY for size in session.report.kv_bytes))
    assert talk.fed == [[27, 1, 1, 1], [26 if another else 6, 1, 1, 1], [6, 1, 1, 1]]
    assert tuple(held) == (composition.again if another else composition.entries)
    talk.check(model, notes)


def test_eviction_goes_on_step_by_step_in_a_later_turn() -> None:
    model, talk = LLAVA.model(), Talk(LLAVA.inputs(ONE))
    with noting() as notes, attach(model, STEPS):
        talk.answer(model)
        talk.ask(text(1, seed=1))
        talk.answer(model)
    for layer in range(4):
        # New entries take the places of old ones, so they do not lie in order.
        forwards = [(past, rows, sorted(held[layer][0, 0].tolist())) for past, rows, held in notes.held]
        tokens = forwards[1][2][:-1]  # what is left of the prompt
        prompt = len(tokens)
        for past, rows, held in forwards[1:]:
            gone = evicted(len(tokens), past, prompt / 27, prompt, -4) if rows == 1 else None
            tokens = [token for place, token in enumerate(tokens) if place != gone] + list(range(past, past + rows))
            assert held == tokens


def test_what_lies_in_blocks_takes_its_share_of_later_attention() -> None:
    first, second = LLAVA.inputs(ONE), LLAVA.inputs([(2, 1, 5)], seed=3)
    for chooser in ("fastv(keep=6)", "fastv(layer=1, keep=5, score='all')"):
        found = []
        # Where no head may give anything to another one, both hold the same entries, one in blocks and one densely.
        for host in ("host='snapkv'", "host='adakv', floor=1.0, normalise=False"):
            model, talk = LLAVA.model(), Talk(first)
            with attach(model, f"{chooser} + mixkv(keep=0.5, window=4, {host})") as session:
                talk.answer(model)
                talk.ask(second)
                talk.answer(model)
            found.append((session.trace.alive(4)[0][0].tolist(), talk.told[-1]))
        assert found[0][0] == found[1][0]
        torch.testing.assert_close(found[0][1], found[1][1], **CLOSE)


# One session after another.

LATER = [
    (BLOCKS, "fastv(layer=1, keep=4)"),
    (BLOCKS, "ivc_prune"),
    (BLOCKS, "shortv(layers=(1,))"),
    (BLOCKS, VIEW),
    (FACTORS, BLOCKS),
    (FEW, "hiprune(keep=5)"),
    (BLOCKS, STEPS),
    (VIEW, "alvts(keep=0.4)"),
    (VIEW, STEPS),
    (STEPS, "folder(keep=6)"),
    (STEPS, VIEW),
    ("hiprune(keep=5)", f"alvts(keep=0.4) + {BLOCKS}"),
]


@pytest.mark.parametrize(("first", "second"), LATER)
def test_a_cache_goes_on_under_another_session(first: str, second: str) -> None:
    model, talk = LLAVA.model(), Talk(LLAVA.inputs([(3, 1, 6), (2, 1, 4)]))
    with noting() as notes:
        with attach(model, first):
            talk.answer(model)
        with pytest.raises(FoveateError, match="compressed under a Foveate session that has ended"):
            model(input_ids=torch.tensor([[20], [20]]), past_key_values=talk.cache)
        with attach(model, second):
            talk.ask(LLAVA.inputs([(2, 1, 5), (3, 1, 4)], seed=3))
            talk.answer(model)
            talk.ask(text(2, seed=2))
            talk.answer(model)
    talk.check(model, notes)


@pytest.mark.parametrize(
    "recipe", [r for r in [*RECIPES, *(composition.recipe for composition in COMPOSITIONS)] if VIEW not in r]
)
def test_attaching_in_mid_conversation_is_as_if_nothing_had_been_removed_before(recipe: str) -> None:
    told = []
    for before in ("none", "uniform(keep=1.0)"):
        model, talk = LLAVA.model(), Talk(LLAVA.inputs(ONE))
        with attach(model, before):
            talk.answer(model)
        with attach(model, recipe):
            talk.ask(LLAVA.inputs([(2, 1, 5)], seed=3))
            talk.answer(model)
            talk.ask(text(1, seed=2))
            talk.answer(model)
        told.append(torch.cat(talk.told, dim=1))
    torch.testing.assert_close(told[0], told[1])


def test_what_was_there_before_the_session_is_read_as_text() -> None:
    told = []
    for recipe in ("none", VIEW):
        model, talk = LLAVA.model(), Talk(LLAVA.inputs(ONE))
        talk.answer(model)
        with attach(model, recipe):
            talk.ask(text(1, seed=2))
            talk.answer(model)
        told.append(talk.told[-1])
    torch.testing.assert_close(told[1], told[0])


# What is refused.


@pytest.mark.parametrize(
    ("name", "recipe", "message"),
    [
        ("llava-clip", f"snapkv + {BLOCKS}", "snapkv + mixkv: each owns the cache; use one of them"),
        ("llava-clip", f"{VIEW} + {STEPS}", "sparsevila + prefixkv: each owns the cache; use one of them"),
        ("llava-clip", "alvts + shortv(layers=(1,))", "alvts + shortv: both route decoder layer 1; use one of them"),
        ("llava-clip", "hidrop + alvts", "hidrop + alvts: both route decoder layer 0; use one of them"),
        (
            "llava-clip",
            "index_preserving + uniform(keep=4)",
            "index_preserving + uniform: uniform needs whole grids, and index_preserving drops tokens before it; "
            "use one of them",
        ),
        (
            "llava-clip",
            "uniform(keep=4) + folder",
            "folder + uniform: uniform needs whole grids, and folder drops tokens before it; use one of them",
        ),
        (
            "llava-clip",
            "ppe + hiprune",
            "ppe + hiprune: hiprune needs whole grids, and ppe drops tokens before it; put it first, or use one of them",
        ),
        (
            "qwen2_5_vl",
            "tome",
            "tome: needs the site 'middle', which qwen2_5_vl does not offer (its vision sites: patches, projected); "
            "use folder(form='features')",
        ),
        (
            "qwen2_5_vl",
            "prumerge",
            "prumerge: needs the site 'pre_projector', which qwen2_5_vl does not offer (its vision sites: patches, "
            "projected); use hiprune or scope",
        ),
        (
            "llava_next",
            "index_preserving",
            "index_preserving: needs the site 'patches', which llava_next does not offer (its vision sites: projected, "
            "tiles); use a method that acts behind the encoder, such as uniform",
        ),
        (
            "qwen3_5",
            "fastv(layer=2)",
            "fastv: reads the attention of decoder layer 1, which has a recurrent state instead; choose other layers, "
            "or a method that acts before the language model",
        ),
        (
            "qwen3_5",
            "ivc_prune",
            "ivc_prune: layer=5: reads the attention of layers [4], which are recurrent; choose others",
        ),
        (
            "qwen3_5",
            "alvts",
            "alvts: needs attention in every layer; layers (0, 1, 2, 4, 5, 6) of qwen3_5 are recurrent; use fastv",
        ),
        (
            "qwen3_5",
            "shortv(layers=(1,))",
            "shortv: decoder layer 1 has a recurrent state, which rows cannot leave and come back to; "
            "choose full-attention layers",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_a_line_with_the_remedy_and_leaves_nothing(
    name: str, recipe: str, message: str
) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(ONE)
    plain, attributes = model(**inputs).logits, set(vars(model))
    with pytest.raises(FoveateError) as refused:
        attach(model, recipe, body)
    assert str(refused.value) == message
    assert set(vars(model)) == attributes
    with attach(model, "none", body):
        assert torch.equal(model(**inputs).logits, plain)


# Helpers.


class Talk:
    """A conversation on one cache.

    Attributes:
        whole: the conversation so far.
        cache: its cache.
        fed: tokens fed in each forward, turn by turn.
        told: logits of each answer.
    """

    def __init__(self, inputs: dict[str, Tensor]) -> None:
        self.whole = dict(inputs)
        self.cache: Any = None
        self.fed: list[list[int]] = []
        self.told: list[Tensor] = []
        self._prompts: list[int] = []
        self._starts = [0]
        self._shown = inputs

    def answer(self, model: Any, steps: int = 4) -> None:
        """Generate."""
        self._prompts.append(self.whole["input_ids"].shape[1])
        with fed_lengths(model) as fed:
            output = generate(model, self._shown, steps, past_key_values=self.cache)
        self.cache = output.past_key_values
        self.fed.append(fed)
        self.told.append(logits(output))
        self.whole = LLAVA.extended(self.whole, output.sequences[:, self._prompts[-1] :])

    def ask(self, inputs: dict[str, Tensor]) -> None:
        """Go on with a question, and with pictures if there are some: one for each sample."""
        if "pixel_values" in inputs:
            self._starts.append(self.whole["input_ids"].shape[1] - 1)  # the last answered token is fed now
            samples, size = len(inputs["input_ids"]), inputs["pixel_values"].shape[1:]
            both = (of["pixel_values"].reshape(samples, -1, *size) for of in (self.whole, inputs))
            self.whole["pixel_values"] = torch.cat(list(both), dim=1).flatten(0, 1)
        mask = torch.cat([self.whole["attention_mask"], inputs["attention_mask"]], dim=1)
        self.whole = LLAVA.extended(self.whole, inputs["input_ids"]) | {"attention_mask": mask}
        self._shown = LLAVA.without_pictures(self.whole) | {k: v for k, v in inputs.items() if k == "pixel_values"}

    def check(self, model: Any, notes: Notes) -> None:
        """Every answer is what the oracle says."""
        expected = masked_logits(model, self.whole, notes.trace, tuple(self._starts), notes)
        for prompt, told in zip(self._prompts, self.told):
            torch.testing.assert_close(told, expected[:, prompt - 1 : prompt - 1 + told.shape[1]], **CLOSE)


def text(batch: int, seed: int) -> dict[str, Tensor]:
    """Five words for each sample."""
    ids = torch.randint(11, tiny.VOCABULARY, (batch, 5), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def forced(model: Any, inputs: dict[str, Tensor], answers: Tensor) -> Tensor:
    """Logits ``[B, n, V]`` of a conversation in which ``answers`` ``[B, n]`` are given token by token."""
    prompt = inputs["input_ids"].shape[1]

    def only(sample: int, ids: Tensor) -> list[int]:
        return [int(answers[sample, len(ids) - prompt])]

    return logits(generate(model, inputs, answers.shape[1], prefix_allowed_tokens_fn=only))


def attach(model: Any, recipe: str | Method, body: Body = LLAVA) -> Session:
    """With what the methods need on this body."""
    return foveate.attach(model, recipe, artifacts=artifacts(body))


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
