"""What a call returns and what is told of it: hidden states, parts called alone, packed rows, helpers of generate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.engine.clock import Clock
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import generate, logits
from tests.suite.oracle import masked_logits, noting, short_logits
from tests.suite.pairs import refusal
from tests.suite.protocols import BLOCKS, CACHES, FACTORS, LLAVA, ROWS, STEPS, VIEW, attached, double, told

CLOSE = dict(rtol=1e-4, atol=1e-4)
IDENTITY = f"uniform(keep=1.0) + fastv(keep=1.0) + {ROWS}"
RECIPES = ["hiprune(keep=6)", "fastv(layer=2, keep=4)", "tome(keep=6)", "shortv(layers=(1,))", "alvts(keep=0.4)", BLOCKS]
TOKENS, SHORT = "hiprune(keep=6) + fastv(layer=2, keep=4)", f"shortv(layers=(1,)) + {ROWS}"
FAMILIES = [BODIES[name] for name in ("llava-clip", "qwen3_vl", "gemma3")]
families = pytest.mark.parametrize("body", FAMILIES, ids=lambda body: body.name)


def hosted(recipes: list[str], bodies: list[Body] = FAMILIES) -> list[Any]:
    """Recipes on the bodies that can host them."""
    return [
        pytest.param(body, recipe, id=f"{body.name}-{recipe}")
        for body in bodies
        for recipe in recipes
        if all(refusal(method, body) is None for method in Recipe.of(recipe).methods)
    ]


# Hidden states and attention maps.


@families
def test_hidden_states_under_an_identity_are_the_models(body: Body) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    there = inputs["attention_mask"].bool()
    with torch.no_grad():
        plain = model(**inputs, output_hidden_states=True)
        with attached(model, "uniform(keep=1.0) + fastv(keep=1.0)", body):
            found = model(**inputs, output_hidden_states=True)
    assert len(found.hidden_states) == len(plain.hidden_states)
    for one, other in zip(found.hidden_states, plain.hidden_states):
        torch.testing.assert_close(one[there], other[there])
    torch.testing.assert_close(found.logits[there], plain.logits[there])


@pytest.mark.parametrize(("body", "recipe"), hosted(RECIPES))
def test_hidden_states_are_in_the_callers_layout(body: Body, recipe: str) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    entered: list[Tensor] = []
    with torch.no_grad(), attached(model, recipe, body) as session:
        layers = session.anatomy.layers
        for layer in layers:
            layer.register_forward_pre_hook(lambda module, args: entered.append(args[0]))
        output = model(**inputs, output_hidden_states=True)
        del entered[len(layers) :]
        assert torch.equal(output.logits, model(**inputs).logits)
    assert len(output.hidden_states) == len(layers) + 1
    assert {tuple(states.shape[:2]) for states in output.hidden_states} == {tuple(inputs["input_ids"].shape)}
    for layer, states in enumerate(output.hidden_states[1:]):  # what left it
        for sample, origin in enumerate(session.trace.log[0][layer].origin):
            gone = torch.ones(states.shape[1], dtype=torch.bool)
            gone[origin[origin >= 0]] = False
            assert not states[sample, gone].any()
            if layer + 1 < len(layers) and body.name != "qwen3_vl":  # which adds to what left its first layers
                assert torch.equal(states[sample, origin[origin >= 0]], entered[layer + 1][sample, origin >= 0])


@families
def test_attention_maps_are_refused_with_the_remedy(body: Body) -> None:
    model, inputs = body.model(attention="eager"), body.inputs(ONE)
    with (
        attached(model, "fastv(layer=2, keep=4)", body),
        pytest.raises(FoveateError, match=r"^output_attentions=True: .*'none'"),
    ):
        model(**inputs, output_attentions=True)
    with attached(model, "none", body), torch.no_grad():
        assert model(**inputs, output_attentions=True).attentions[0].shape[-1] == inputs["input_ids"].shape[1]


# Parts of the model, and arguments by place.


@pytest.mark.parametrize(("body", "recipe"), hosted(["none", "hiprune(keep=6)", "fastv(layer=2, keep=4)", *CACHES]))
def test_the_language_model_can_be_called_alone(body: Body, recipe: str) -> None:
    model = body.model()
    inputs = body.inputs([(3, 0, 9), (2, 0, 4)])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    there = mask.bool()
    alone = model.model.language_model
    with torch.no_grad():
        plain, plain_padded = alone(ids[:1]).last_hidden_state, alone(ids, mask).last_hidden_state
        embedded = alone.get_input_embeddings()(ids)
        with attached(model, recipe, body) as session:
            torch.testing.assert_close(alone(ids[:1]).last_hidden_state, plain)
            torch.testing.assert_close(alone(input_ids=ids[:1], return_dict=False)[0], plain)
            for output in (alone(ids, mask), alone(inputs_embeds=embedded, attention_mask=mask)):
                torch.testing.assert_close(output.last_hidden_state[there], plain_padded[there])
            assert session.report.visual_tokens == (0,) * len(session.anatomy.layers)


@pytest.mark.parametrize(("body", "recipe"), hosted(["none", TOKENS, SHORT]))
def test_what_merges_pictures_and_text_can_be_called_alone(body: Body, recipe: str) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    with torch.no_grad(), attached(model, recipe, body) as session:
        expected = model(**inputs).logits, told(session)
        states = model.model(**inputs).last_hidden_state
        assert torch.equal(model.lm_head(states), expected[0])
        assert told(session) == expected[1]


@families
def test_labels_of_dropped_rows_do_not_count_and_answers_are_told_without_the_head(body: Body) -> None:
    model, inputs = body.model(), body.inputs(ONE)
    ids = inputs["input_ids"]
    labels = ids.masked_fill(ids == 0, -100)
    with torch.no_grad(), attached(model, TOKENS, body) as session:
        output = model(**inputs, labels=labels)
        alive = torch.zeros_like(ids, dtype=torch.bool).scatter(1, session.trace.log[-1][-1].origin, True)
        counted = torch.nn.functional.cross_entropy(output.logits[:, :-1][alive[:, :-1]], ids[:, 1:][alive[:, :-1]])
        torch.testing.assert_close(output.loss, counted)

        labels = labels.masked_fill(torch.arange(ids.shape[1]) < ids.shape[1] - 3, -100)
        expected = model(**inputs, labels=labels).logits
        states = model.model(**inputs, labels=labels).last_hidden_state
        assert session.trace.log[-1][0].answers == (3,)
        assert torch.equal(model.lm_head(states), expected)


@pytest.mark.parametrize("recipe", ["none", TOKENS, SHORT])
def test_arguments_by_place_are_arguments_by_name(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    ids, mask, pixels = (inputs[name] for name in ("input_ids", "attention_mask", "pixel_values"))
    with torch.no_grad(), attached(model, recipe) as session:
        for called in (model, model.model):
            expected = called(**inputs)[0], told(session)
            assert torch.equal(called(ids, pixels, mask)[0], expected[0])
            assert told(session) == expected[1]
        loss = model(**inputs, labels=ids).loss
        assert torch.equal(model(ids, pixels, mask, None, None, None, None, None, ids).loss, loss)


# Packed rows.


@pytest.mark.parametrize("name", ["llava-clip", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3"])
@pytest.mark.parametrize("cached", [True, False])
def test_packed_rows_run_unmodified_as_in_the_plain_model(name: str, cached: bool) -> None:
    body = BODIES[name]
    model = body.model()
    ids = body.inputs([(3, 0, 6)])["input_ids"]
    packed = torch.cat([ids, ids.flip(1)], dim=1)
    positions = torch.arange(ids.shape[1]).repeat(2)[None]
    given: dict[str, Any] = dict(input_ids=packed, position_ids=positions, use_cache=cached)
    with torch.no_grad():
        plain, alone = model(**given).logits, model(input_ids=ids, use_cache=False).logits
        with attached(model, "none", body):
            assert torch.equal(model(**given).logits, plain)
            assert torch.equal(model.model.language_model(**given)[0], model.model.language_model(**given).last_hidden_state)
        if not cached and not name.startswith("qwen"):  # which number packed rows on four axes
            torch.testing.assert_close(plain[:, : ids.shape[1]], alone)
        with (
            attached(model, IDENTITY, body),
            pytest.raises(FoveateError, match=r"^position_ids: several prompts are packed"),
        ):
            model(**dict(given, use_cache=True))


# Helpers of generate.


@pytest.mark.parametrize(
    "recipe", ["hiprune(keep=6)", "fastv(layer=2, keep=4)", ROWS, BLOCKS, VIEW, STEPS, f"{FACTORS[:-1]}, grouping='prompt')"]
)
def test_an_assistant_is_refused_with_the_remedy(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    message = r"^assistant_model: not possible under [^\n]*; use prompt_lookup_num_tokens, which needs no second model$"
    with attached(model, recipe):
        with pytest.raises(FoveateError, match=message):
            generate(model, inputs, 4, assistant_model=LLAVA.model())
        with pytest.raises(FoveateError, match=message):
            model.generate(None, None, None, None, None, None, LLAVA.model(), **inputs, max_new_tokens=4)
        expected = generate(model, inputs, 8).sequences
        if recipe != STEPS:
            assert torch.equal(generate(model, inputs, 8, prompt_lookup_num_tokens=3).sequences, expected)


# The report.


@pytest.mark.parametrize("recipe", ["none", *(recipe for recipe in RECIPES if recipe != BLOCKS)])
def test_the_report_without_a_cache_is_that_of_the_prompt_and_names_no_cache(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    with attached(model, recipe) as session:
        generate(model, inputs, 4)
        cached = session.report
        for options in ({}, {"guidance_scale": 1.5}):
            generate(model, inputs, 4, use_cache=False, **options)
            report = session.report
            assert (report.rows, report.visual_tokens, report.active) == (cached.rows, cached.visual_tokens, cached.active)
            assert (report.flops, report.decode_steps) == (cached.flops, cached.decode_steps) == (cached.flops, 3)
            assert sum(report.kv_bytes) == 0


@pytest.mark.parametrize("recipe", ["none", *RECIPES, ROWS, VIEW, STEPS])
def test_guidance_is_told_of_as_if_there_were_none(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    plain = logits(generate(model, inputs, 4, guidance_scale=1.5))
    negative = torch.randint(11, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    with attached(model, recipe) as session:
        first = logits(generate(model, inputs, 1))
        generate(model, inputs, 4)
        expected = told(session)
        for options in ({}, {"negative_prompt_ids": negative}):
            guided = logits(generate(model, inputs, 4, guidance_scale=1.5, **options))
            assert told(session) == expected
            assert torch.equal(guided[:, :1], first)
        if recipe == "none":
            assert torch.equal(logits(generate(model, inputs, 4, guidance_scale=1.5)), plain)


@pytest.mark.parametrize("recipe", ["none", "fastv(layer=2, keep=4)", ROWS, VIEW])
def test_a_later_turn_is_told_of_as_itself(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with attached(model, recipe) as session:
        output = generate(model, inputs, 3)
        more = torch.tensor([[20, 21, 22, 23]])
        whole = LLAVA.extended(inputs, torch.cat([output.sequences[:, inputs["input_ids"].shape[1] :], more], dim=1))
        output = generate(model, LLAVA.without_pictures(whole), 4, past_key_values=output.past_key_values)
        report = session.report
    assert report.rows == (5,) * 4  # the last token of the answer, which no forward was fed, and the new ones
    assert (report.visual_tokens, report.original_visual_tokens) == ((0,) * 4, 0)
    assert report.decode_steps == 3
    assert session.trace.log == []
    assert report.kv_bytes == tuple(
        layer.nbytes if hasattr(layer, "nbytes") else layer.keys.nbytes * 2 for layer in output.past_key_values.layers
    )


# Pictures and videos.

QWEN = [BODIES[name] for name in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")]


def both(body: Body, kinds: str, right: bool = False, only: int | None = None) -> dict[str, Tensor]:
    """Two prompts with a picture and a video each, in the order of ``kinds``, of which the second is longer."""
    token = {"p": tiny.IMAGE, "v": tiny.VIDEO}
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(11, tiny.VOCABULARY, (2, 20), generator=generator).tolist()
    rows = [
        [1, 20, *[token[kinds[0]]] * 16, *w[:3], *[token[kinds[1]]] * 16, *w[3 : 8 + 4 * n]] for n, w in enumerate(words)
    ]
    pictures, videos = (torch.randn(2, 64, 48, generator=generator) for _ in range(2))
    chosen = range(2) if only is None else [only]
    width = max(len(rows[n]) for n in chosen)
    padding = [[0] * (width - len(rows[n])) for n in chosen]
    ids = torch.tensor([rows[n] + pad if right else pad + rows[n] for n, pad in zip(chosen, padding)])
    grid = torch.tensor([[1, 8, 8]]).repeat(len(chosen), 1)
    types = (ids == tiny.IMAGE).long() + 2 * (ids == tiny.VIDEO).long()
    return {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "mm_token_type_ids": types,
        "pixel_values": pictures[list(chosen)].flatten(0, 1),
        "image_grid_thw": grid,
        "pixel_values_videos": videos[list(chosen)].flatten(0, 1),
        "video_grid_thw": grid,
    }


@pytest.mark.parametrize(("body", "recipe"), hosted(["uniform(keep=6)", "hiprune(keep=6)", "fastv(layer=2, keep=5)"], QWEN))
@pytest.mark.parametrize("kinds", ["pv", "vp"])
def test_a_picture_and_a_video_in_one_prompt(body: Body, kinds: str, recipe: str) -> None:
    model = body.model().double()
    found = []
    with torch.no_grad():
        for how in ({}, {"right": True}, {"only": 0}, {"only": 1}):
            inputs = double(both(body, kinds, **how))
            with noting() as notes, attached(model, recipe, body) as session:
                output, trace = model(**inputs).logits, session.trace
            if "right" not in how:
                recurrent = session.anatomy.traits().recurrent
                expected = (
                    short_logits(model, inputs, trace, notes) if recurrent else masked_logits(model, inputs, trace, (0,))
                )
                torch.testing.assert_close(output[:, -1], expected[:, -1], **CLOSE)
            ends = inputs["attention_mask"].cumsum(1).argmax(1)
            alive = [[item.tolist() for item in sample] for sample in trace.alive(len(session.anatomy.layers))]
            found.append((alive, output[torch.arange(len(ends)), ends]))
    left, right, *alone = found
    assert left[0] == right[0] == [sample for one in alone for sample in one[0]]
    for other in (right[1], torch.cat([one[1] for one in alone])):
        torch.testing.assert_close(other, left[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("body", "recipe"), hosted(["hiprune(keep=6)", "scope(keep=6)", "folder(keep=6)"], QWEN))
def test_what_is_kept_of_a_picture_does_not_depend_on_a_video_beside_it(body: Body, recipe: str) -> None:
    model = body.model().double()
    alive = []
    with torch.no_grad(), attached(model, recipe, body) as session:
        for kinds in ("pv", "vp"):
            model(**double(both(body, kinds)))
            alive.append([[item.tolist() for item in sample] for sample in session.trace.alive(1)])
        picture = body.inputs([(3, 1, 6)])
        first = both(body, "pv")
        picture |= {"pixel_values": first["pixel_values"][:64], "image_grid_thw": first["image_grid_thw"][:1]}
        model(**double(picture))
        alone = session.trace.alive(1)[0][0].tolist()
    assert alive[0] == [sample[::-1] for sample in alive[1]]
    assert alive[0][0][0] == alone


# Other devices.


def test_a_clock_waits_for_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream: Any) -> None:
            calls.append(stream)

        def synchronize(self) -> None:
            calls.append("end")

        def elapsed_time(self, other: Any) -> float:
            return 500.0

    def noting(name: str) -> Callable[..., Any]:
        return lambda device: calls.append((name, device)) or device

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", noting("stream"))
    device = torch.device("cuda", 3)
    clock = Clock(device)
    with clock.lap("prefill"):
        pass
    assert clock.seconds("prefill") == 0.5
    assert calls == [("stream", device), device, ("stream", device), device, "end"]


def test_a_mask_that_does_not_cover_the_conversation_is_refused_by_name() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    token = inputs["input_ids"][:, -1:]
    with attached(model, "hiprune(keep=6)"), torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(FoveateError, match="attention_mask: has 1 columns; must have one for each of the"):
            model(input_ids=token, attention_mask=torch.ones_like(token), past_key_values=cache)
