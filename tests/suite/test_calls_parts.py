"""Prompts that come in parts: a prefix read before, a prefix for several requests, pictures encoded before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.core.method import Method
from tests.suite.bodies import BODIES, ONE, Body
from tests.suite.conversation import generate, logits
from tests.suite.protocols import LLAVA, attached, double, methods, told

EXACT = dict(rtol=1e-6, atol=1e-6)
CACHES = [
    "snapkv(keep=0.4, window=8)",
    "snapkv(keep=0.4, window=8, tokens='visual')",
    *(f"pyramidkv(keep=0.4, window=8, beta=3, reading='{reading}')" for reading in ("kvpress", "original")),
    *(f"mixkv(keep=0.4, window=8, host='{host}')" for host in ("snapkv", "pyramidkv", "adakv")),
    "prefixkv(keep=0.4)",
    "prefixkv(keep=12, search='bisect')",
    "sparsevila(keep=1.0, decode_keep=0.4)",
    "attentionpack(rank=6)",
    "kivi(size=8, residual=4)",
    "aircache(keep=0.2, alpha=0.5)",
    "flashcache(keep=0.4, tokens='visual')",
]
OTHERS = ["qwen2_5_vl", "llava_next"]
OF_OTHERS = ["uniform(keep=6)", "folder(keep=6)", "hiprune(keep=6)"]
TEXT = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")
caches = pytest.mark.parametrize("recipe", CACHES)
RAGGED = [(12, 1, 20), (9, 1, 26)]
"""Samples whose beginning is text of more than the prefix, the second one padded."""


def parted(inputs: dict[str, Tensor], first: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The first columns as text alone, and the rest, with the mask of both."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return (
        {"input_ids": ids[:, :first], "attention_mask": mask[:, :first]},
        dict(inputs, input_ids=ids[:, first:]),
    )


def held(cache: Any, sample: int) -> list[list[list[int]]]:
    """Tokens that each head of each layer holds of a sample."""
    rows = [layer.whole.tokens(sample + 1, torch.device("cpu"))[sample] for layer in cache.layers]
    return [[sorted(token for token in head.tolist() if token >= 0) for head in heads] for heads in rows]


@caches
@pytest.mark.parametrize("under", [True, False], ids=["read under the session", "read before attach"])
@pytest.mark.parametrize("samples", [RAGGED[:1], RAGGED], ids=["one sample", "padded"])
def test_a_cache_is_compressed_behind_a_prefix_as_at_once(recipe: str, under: bool, samples: list[Any]) -> None:
    model, inputs = LLAVA.model().double(), double(LLAVA.inputs(samples))
    prefix, rest = parted(inputs, 6)
    ids, mask = torch.full((len(samples),), 20), torch.nn.functional.pad(inputs["attention_mask"], (0, 1), value=1)
    with torch.no_grad():
        before = None if under else model(**prefix, use_cache=True).past_key_values
        with attached(model, recipe) as session:
            whole = model(**inputs, use_cache=True).past_key_values
            at_once = session.report.kv_kept
            before = model(**prefix, use_cache=True).past_key_values if under else before
            cache = model(**rest, past_key_values=before, use_cache=True).past_key_values
            shares = session.report.kv_kept
            if "prefixkv" in recipe:  # which asks what all queries look at, and those of the prefix have been forgotten
                assert sum(shares) <= sum(at_once) + 0.1
                return
            whole_stays = any(name in recipe for name in ("sparsevila", "attentionpack", "kivi"))
            assert [whole_stays] == sorted({share == 1 for share in shares})
            for sample in range(len(samples)):
                assert held(cache, sample) == held(whole, sample)
            told = [model(ids[:, None], attention_mask=mask, past_key_values=of).logits for of in (cache, whole)]
    torch.testing.assert_close(*told, **EXACT)


@pytest.mark.parametrize("method", methods(), ids=str)
@pytest.mark.parametrize("under", [True, False], ids=["read under the session", "read before attach"])
def test_what_is_kept_of_a_picture_behind_a_prefix_is_what_is_kept_at_once(method: Method, under: bool) -> None:
    model, inputs = LLAVA.model().double(), double(LLAVA.inputs(RAGGED))
    prefix, rest = parted(inputs, 6)
    with torch.no_grad():
        before = None if under else model(**prefix, use_cache=True).past_key_values
        with attached(model, method) as session:
            model(**inputs)
            expected = session.trace.alive(4)
            if under:
                before = model(**prefix, use_cache=True).past_key_values
                assert session.trace.log == []
            model(**rest, past_key_values=before)
            found = session.trace.alive(4)
    assert [[one.tolist() for one in sample] for sample in found] == [
        [one.tolist() for one in sample] for sample in expected
    ]


@pytest.mark.parametrize("recipe", ["none", "fastv(layer=2, keep=4)", *CACHES])
def test_a_prefix_is_copied_for_several_requests(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    prefix, _ = parted(inputs, 6)
    with torch.no_grad(), attached(model, recipe) as session:
        shared = model(**prefix, use_cache=True).past_key_values
        before = held(shared, 0) if recipe != "none" else [layer.keys.shape for layer in shared.layers]
        found = []
        for _ in range(3):
            cache = copy.deepcopy(shared)
            found.append((logits(generate(model, inputs, 3, past_key_values=cache)).tolist(), told(session)))
            assert cache.get_seq_length() == inputs["input_ids"].shape[1] + 2
        assert shared.get_seq_length() == 6
        assert before == (held(shared, 0) if recipe != "none" else [layer.keys.shape for layer in shared.layers])
    assert found[0] == found[1] == found[2]
    assert len(session.trace.log) == 1


# Pictures that were encoded before.

ENCODED: list[tuple[Body, Method]] = [
    *((LLAVA, method) for method in methods(caches=False)),
    *((BODIES[name], foveate.Recipe.of(recipe).methods[0]) for name in OTHERS for recipe in OF_OTHERS),
]


def text(body: Body, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A prompt's inputs without the pixels; grids and sizes, which place the rows, stay."""
    return {name: value for name, value in inputs.items() if not name.startswith("pixel_values")}


@pytest.mark.parametrize(("body", "method"), ENCODED, ids=lambda of: getattr(of, "name", str(of)))
def test_pictures_encoded_once_keep_the_tokens_that_pixels_keep(body: Body, method: Method) -> None:
    first = body.inputs([(3, 1, 6), (2, 1, 8)])
    words = body.inputs([(5, 1, 4), (2, 1, 12)], seed=7)
    second = {name: (words if name in TEXT else first)[name] for name in words}
    model = body.model()
    with torch.no_grad(), attached(model, method, body) as session:
        encoded = session.encode(**first)
        for inputs in (first, second, first):
            for call in (forward, answer, beams):
                expected = call(model, inputs), told(session)
                found = call(model, text(body, inputs) | encoded), told(session)
                assert torch.equal(found[0], expected[0])
                assert found[1] == expected[1]


def forward(model: Any, inputs: dict[str, Any]) -> Tensor:
    return model(**inputs).logits  # type: ignore[no-any-return]


def answer(model: Any, inputs: dict[str, Any]) -> Tensor:
    return logits(generate(model, inputs, 3))


def beams(model: Any, inputs: dict[str, Any]) -> Tensor:
    return generate(model, inputs, 3, num_beams=2).sequences  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llava-clip", "llava_next", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl"])
def test_pictures_encoded_elsewhere_are_refused_with_the_remedy(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(ONE)
    shown = {key: value for key, value in inputs.items() if key not in TEXT}
    with torch.no_grad():
        elsewhere = {"mm_encoder_outputs": {"image": model.get_image_features(**shown)}}
        plain = model(**text(body, inputs), **elsewhere).logits
        with attached(model, "fastv(layer=2, keep=4)", body) as session:
            under_another = session.encode(**inputs)
            model(**text(body, inputs), **under_another)
        with attached(model, "none", body):
            assert torch.equal(model(**text(body, inputs), **elsewhere).logits, plain)
        for outputs in (elsewhere, under_another):
            with attached(model, "uniform(keep=6)", body), pytest.raises(FoveateError) as refused:
                model(**text(body, inputs), **outputs)
            assert str(refused.value).startswith(
                f"input_ids: {body.placeholders()} image placeholders, but no image was encoded under"
            )
            assert str(refused.value).endswith("hand in pixels, or mm_encoder_outputs from session.encode(...)")
