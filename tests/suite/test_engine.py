"""Ways of calling a model under a recipe, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import foveate
from foveate.core.errors import FoveateError
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED, joined
from tests.suite.conversation import generate, logits
from tests.suite.oracle import masked_logits, noting

LLAVA = BODIES["llava-clip"]
RECIPE = "hiprune(keep=9, positions='anchor') + fastv(layer=2, keep=5)"
CLOSE = dict(rtol=1e-4, atol=1e-4)


def test_plain_forward_returns_the_callers_layout() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    with torch.no_grad(), foveate.attach(model, RECIPE) as session:
        output = model(**inputs)
    expected = masked_logits(model, inputs, session.trace, (0,))
    alive = session.trace.log[0][-1].origin
    for sample in range(len(RAGGED)):
        rows = alive[sample][alive[sample] >= 0]
        torch.testing.assert_close(output.logits[sample, rows], expected[sample, rows], **CLOSE)
    assert output.logits.shape[:2] == inputs["input_ids"].shape


@pytest.mark.parametrize("name", ["llava-clip", "qwen3_vl"])
@pytest.mark.parametrize("asked", [True, 2, [0, 3, -1]], ids=str)
def test_hidden_states_are_those_of_the_model_and_zero_where_a_row_is_gone(name: str, asked: Any) -> None:
    """Also where rows of the encoder are added between two layers (Qwen3-VL)."""
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(ONE)
    with torch.no_grad():
        plain = body.model()(**inputs, output_hidden_states=asked).hidden_states
        with foveate.attach(model, "fastv(layer=2, keep=1.0)"):
            whole = [model(**inputs, output_hidden_states=asked).hidden_states for _ in range(2)]
        with foveate.attach(model, "fastv(layer=2, keep=5)") as session:
            pruned = model(**inputs, output_hidden_states=asked).hidden_states
    torch.testing.assert_close(whole, [plain, plain])
    entered = session.trace.log[0]
    for number, (layout, x, expected) in enumerate(zip([entered[0], *entered], pruned, plain)):
        if expected is None:
            assert x is None
            continue
        gone = torch.ones(x.shape[1], dtype=torch.bool)
        gone[layout.origin[0, layout.origin[0] >= 0]] = False
        assert int(gone.sum()) == (11 if number > 2 else 0)
        assert not x[0, gone].any()
        if number <= 2:
            torch.testing.assert_close(x, expected)


def test_right_padded_prompts_are_answered_as_alone() -> None:
    model = LLAVA.model().double()
    left = LLAVA.inputs(RAGGED)
    shift = (left["attention_mask"] == 0).sum(1)
    right = dict(left)
    for key in ("input_ids", "attention_mask"):
        right[key] = torch.stack([row.roll(-int(n)) for row, n in zip(left[key], shift)])
    pixels = left["pixel_values"].double()
    with torch.no_grad(), foveate.attach(model, RECIPE):
        expected = model(**dict(left, pixel_values=pixels)).logits[:, -1]
        output = model(**dict(right, pixel_values=pixels)).logits
    last = right["attention_mask"].sum(1) - 1
    torch.testing.assert_close(output[torch.arange(3), last], expected, rtol=1e-6, atol=1e-6)


def test_labels_give_a_finite_loss_and_gradients_reach_the_embeddings() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == tiny.IMAGE, -100)
    with foveate.attach(model, RECIPE):
        loss = model(**inputs, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0


def test_text_only_prompts_are_untouched() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs([(3, 0, 6), (2, 0, 9)])
    plain = logits(generate(model, inputs, 4))
    with foveate.attach(model, RECIPE + " + shortv(layers=(1,))"):
        assert torch.equal(logits(generate(model, inputs, 4)), plain)


def test_a_batch_may_mix_prompts_with_and_without_images() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs([(3, 1, 6), (2, 0, 9)])
    with foveate.attach(model, RECIPE) as session:
        generate(model, inputs, 4)
    assert [[len(item) for item in sample] for sample in session.trace.alive(4)] == [[5], []]


@pytest.fixture(params=[1, 2], ids=["one image", "several images"])
def two_prompts(request: pytest.FixtureRequest) -> dict[str, torch.Tensor]:
    """Two prompts that `generate` can repeat (older transformers deal several images out to the wrong copies)."""
    inputs = LLAVA.inputs([(3, 1, 6), (2, request.param, 4)])
    model = LLAVA.model()
    once, thrice = (logits(generate(model, inputs, 1, do_sample=True, num_return_sequences=n)) for n in (1, 3))
    if not torch.allclose(thrice, once.repeat_interleave(3, 0), atol=1e-4):
        pytest.skip("this transformers repeats prompts with several images wrongly, recipe or not")
    return inputs


def test_sampling_and_several_answers_to_one_prompt(two_prompts: dict[str, torch.Tensor]) -> None:
    model, inputs = LLAVA.model(), two_prompts
    with foveate.attach(model, RECIPE) as session:
        greedy = generate(model, inputs, 3)
        torch.manual_seed(0)
        many = generate(model, inputs, 3, do_sample=True, num_return_sequences=3)
    first = logits(many)[:, 0].reshape(2, 3, -1)
    torch.testing.assert_close(first, logits(greedy)[:, :1].expand(-1, 3, -1), **CLOSE)
    assert len(session.trace.alive(4)) == 6


def test_beam_search_equals_its_oracle(two_prompts: dict[str, torch.Tensor]) -> None:
    model, inputs = LLAVA.model(), two_prompts
    prompt = inputs["input_ids"].shape[1]
    with foveate.attach(model, RECIPE) as session:
        output = generate(model, inputs, 5, num_beams=3, num_return_sequences=1, output_scores=True)
    whole = LLAVA.extended(inputs, output.sequences[:, prompt:-1])
    trace = session.trace
    trace.log = [[_every(layout, 3) for layout in trace.log[0]]]
    expected = masked_logits(model, whole, trace, (0,))[:, prompt - 1 :].log_softmax(-1)
    chosen = output.sequences[:, prompt:]
    total = expected.gather(2, chosen[..., None])[..., 0].sum(1) / chosen.shape[1]
    torch.testing.assert_close(output.sequences_scores, total, **CLOSE)


def _every(layout: Any, step: int) -> Any:
    from dataclasses import replace

    rows = {name: getattr(layout, name)[::step] for name in ("origin", "role", "item", "ordinal", "size")}
    return replace(layout, **rows, positions=layout.positions[:, ::step], items=layout.items[::step])


@pytest.mark.parametrize("name", list(BODIES))
def test_a_second_turn_may_bring_another_image(name: str) -> None:
    body = BODIES[name]
    if name.startswith("qwen"):
        pytest.skip("transformers computes rope deltas for the first turn only when images come in a later one")
    model, inputs = body.model(), body.inputs(ONE)
    prompt = inputs["input_ids"].shape[1]
    recipe = "fastv(keep=5)"
    with torch.no_grad(), noting() as notes, foveate.attach(model, recipe):
        cache = model(**inputs, use_cache=True).past_key_values
        more = body.inputs([(2, 1, 5)], seed=3)
        for key in {"attention_mask", body.type_key} & more.keys():  # both speak of the whole conversation
            more[key] = torch.cat([inputs[key], more[key]], dim=1)
        output = model(**more, past_key_values=cache).logits[:, -1]
    whole = body.extended(inputs, more["input_ids"])
    shown = inputs.keys() - {"input_ids", "attention_mask", body.type_key}
    whole |= {key: torch.cat([inputs[key], more[key]]) for key in shown - {"pixel_values"}}
    whole["pixel_values"] = joined([inputs["pixel_values"], more["pixel_values"]])
    expected = masked_logits(model, whole, notes.trace, (0, prompt))
    torch.testing.assert_close(output, expected[:, -1], **CLOSE)


def test_prompt_lookup_decoding_gives_the_greedy_answer() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with foveate.attach(model, RECIPE):
        plain = generate(model, inputs, 12).sequences
        assisted = generate(model, inputs, 12, prompt_lookup_num_tokens=3).sequences
    assert torch.equal(assisted, plain)


def test_without_a_cache_the_logits_are_the_same() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with torch.no_grad(), foveate.attach(model, RECIPE + " + shortv(layers=(1,))"):
        cached = model(**inputs)
        uncached = model(**inputs, use_cache=False)
    assert uncached.past_key_values is None
    assert torch.equal(cached.logits, uncached.logits)


def test_attaching_in_mid_conversation_keeps_what_the_plain_cache_holds() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
        ids = torch.tensor([[20, 21, 22]])
        whole = LLAVA.extended(inputs, ids)
        expected = model(**whole).logits[:, -1]
        with foveate.attach(model, RECIPE):
            output = model(input_ids=ids, attention_mask=whole["attention_mask"], past_key_values=cache).logits[:, -1]
    torch.testing.assert_close(output, expected, **CLOSE)


def test_a_compressed_cache_refuses_to_be_used_without_a_session() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with torch.no_grad():
        with foveate.attach(model, RECIPE):
            cache = model(**inputs, use_cache=True).past_key_values
        with pytest.raises(FoveateError, match="this cache was compressed under a Foveate session that has ended"):
            model(input_ids=torch.tensor([[20]]), past_key_values=cache)


def test_a_compressed_cache_goes_on_under_a_new_session() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    ids = torch.tensor([[20, 21]])
    with torch.no_grad():
        with foveate.attach(model, RECIPE):
            cache = model(**inputs, use_cache=True).past_key_values
            copy = [(layer.keys.clone(), layer.values.clone(), layer.ledger) for layer in cache.layers]
            expected = model(input_ids=ids, past_key_values=cache).logits
        for layer, (keys, values, ledger) in zip(cache.layers, copy):
            layer.keys, layer.values, layer.ledger = keys, values, ledger
        with foveate.attach(model, "fastv(keep=3)"):
            torch.testing.assert_close(model(input_ids=ids, past_key_values=cache).logits, expected)


@pytest.mark.parametrize(
    "recipe",
    [
        "uniform(keep=6)",
        "snapkv(keep=0.5, window=4)",
        "mixkv(keep=0.5, window=4, host='adakv')",
        "prefixkv(keep=0.5, distance=-4)",
        "sparsevila(keep=6, decode_keep=0.5)",
        "aircache(keep=6)",
    ],
)
def test_a_sample_without_padding_is_decoded_without_a_mask(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    masks: list[Any] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs["attention_mask"])

    with foveate.attach(model, recipe):
        for layer in model.model.language_model.layers:
            layer.register_forward_pre_hook(note, with_kwargs=True)
        generate(model, inputs, 6)
    assert masks == [None] * 4 * 6


@pytest.mark.parametrize("samples", [ONE, RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "recipe",
    [
        "none",
        "random(keep=5)",
        "fastv(layer=1, keep=6)",
        "ivc_prune",
        "snapkv(keep=0.5, window=4)",
        "prefixkv(keep=0.5, distance=-4)",
        "sparsevila(keep=6, decode_keep=0.5)",
        "aircache(keep=6)",
    ],
)
def test_a_cache_that_knows_of_no_windows_gives_the_same_answer(recipe: str, samples: list[tuple[int, int, int]]) -> None:
    """Made without the configuration, it holds everything of layers with sliding attention, too."""
    body = BODIES["gemma3"]
    model, inputs = body.model(), body.inputs(samples)
    with foveate.attach(model, recipe):
        windows = generate(model, inputs)
        none = generate(model, inputs, past_key_values=DynamicCache())
        outputs = (windows, none)
        turns = [
            body.extended(inputs, torch.cat([out.sequences[:, -16:], inputs["input_ids"][:, -3:]], 1)) for out in outputs
        ]
        later = [
            generate(model, body.without_pictures(turn), past_key_values=out.past_key_values)
            for turn, out in zip(turns, outputs)
        ]
    torch.testing.assert_close(logits(none), logits(windows), **CLOSE)
    torch.testing.assert_close(logits(later[1]), logits(later[0]), **CLOSE)


@pytest.mark.parametrize("recipe", ["random(keep=5)", "fastv(layer=1, keep=6)", "snapkv(keep=0.5, window=4)"])
def test_layers_with_sliding_attention_hold_no_more_than_their_window(recipe: str) -> None:
    body = BODIES["gemma3"]
    model, inputs = body.model(), body.inputs(RAGGED)
    plain = generate(model, inputs).past_key_values
    with foveate.attach(model, recipe):
        cache = generate(model, inputs).past_key_values
    sliding = [layer for layer, kind in enumerate(model.config.text_config.layer_types) if kind == "sliding_attention"]
    for layer in sliding:
        assert cache.layers[layer].keys.shape == plain.layers[layer].keys.shape


def test_static_caches_are_refused_with_the_remedy() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    cache = StaticCache(config=model.config.text_config, max_cache_len=64)
    with foveate.attach(model, RECIPE), pytest.raises(FoveateError, match="use a DynamicCache"):
        model(**inputs, past_key_values=cache)


def test_chunked_prefill_is_refused_with_the_remedy_for_methods_inside_the_language_model() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with foveate.attach(model, RECIPE), pytest.raises(FoveateError, match="prefill_chunk_size=None"):
        generate(model, inputs, 2, prefill_chunk_size=8)


def test_chunked_prefill_that_cuts_an_image_is_refused_before_the_language_model() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with foveate.attach(model, "uniform(keep=4)"), pytest.raises(FoveateError, match="prefill_chunk_size=None"):
        generate(model, inputs, 2, prefill_chunk_size=8)


def test_continuous_batching_is_refused_with_the_remedy() -> None:
    model = LLAVA.model()
    with foveate.attach(model, RECIPE), pytest.raises(FoveateError, match="use generate"):
        model.generate_batch([[1, 20, 21]])


def test_embeddings_instead_of_ids_are_refused_with_the_remedy() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs([(3, 0, 6)])
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    with foveate.attach(model, RECIPE), pytest.raises(FoveateError, match="needs input_ids"):
        model(inputs_embeds=embeds)


def test_an_unsupported_model_is_told_which_families_are_supported() -> None:
    with pytest.raises(FoveateError, match="'Linear': not supported; supported families: llava, gemma3, qwen3_vl"):
        foveate.attach(torch.nn.Linear(2, 2), "random")


def test_a_second_session_on_one_model_is_refused() -> None:
    model = LLAVA.model()
    with foveate.attach(model, "random"), pytest.raises(FoveateError, match="detach that session first"):
        foveate.attach(model, "uniform")
    foveate.attach(model, "uniform").detach()


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("random + hiprune", "random \\+ hiprune: hiprune needs whole grids"),
        ("snapkv + snapkv(keep=0.3)", "snapkv \\+ snapkv: each owns the cache"),
        ("shortv(layers=(1,)) + shortv(layers=(1, 2))", "both route decoder layer 1"),
        ("fastv(layer=4)", "fastv: layer=4: must be in 1..3"),
        ("hiprune(object_layer=9)", "hiprune: object_layer=9: must be in 1..4"),
        ("shortv(layers=(4,))", "shortv: layers=\\(4,\\): must be in 0..3"),
        ("shortv", "shortv: no layer order is known for llava"),
    ],
)
def test_impossible_recipes_are_refused_at_attach_and_leave_nothing(recipe: str, message: str) -> None:
    model = LLAVA.model()
    with pytest.raises(FoveateError, match=message):
        foveate.attach(model, recipe)
    foveate.attach(model, "none").detach()


def test_two_models_may_run_different_recipes_at_once() -> None:
    first, second, inputs = LLAVA.model(), LLAVA.model(), LLAVA.inputs(ONE)
    with foveate.attach(first, "fastv(keep=4)") as a, foveate.attach(second, "fastv(keep=8)") as b:
        generate(first, inputs, 2)
        generate(second, inputs, 2)
    assert (a.report.visual_tokens[-1], b.report.visual_tokens[-1]) == (4, 8)


def test_the_report_counts_tokens_bytes_and_steps() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with foveate.attach(model, "fastv(layer=2, keep=4)") as session:
        output = generate(model, inputs, 5)
    report = session.report
    assert report.original_visual_tokens == 16
    assert report.visual_tokens == (16, 16, 4, 4)
    held = [layer.keys.nbytes + layer.values.nbytes for layer in output.past_key_values.layers]
    assert list(report.kv_bytes) == held
    assert held[0] > held[2]
    assert report.decode_steps == 4
    assert 0 < report.flops < report.flops_unmodified
    assert "16 (layers 0-1), 4 (layers 2-3)" in str(report)


def test_an_empty_recipe_only_measures() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    plain = generate(model, inputs, 3)
    with foveate.attach(model, "none") as session:
        output = generate(model, inputs, 3)
    assert torch.equal(logits(output), logits(plain))
    assert type(output.past_key_values) is DynamicCache
    assert session.report.visual_tokens == (16,) * 4
    assert session.report.flops == session.report.flops_unmodified
