"""Presses of kvpress on vision-language models, beside what kvpress' own hooks keep; and the line where it is missing."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.core.roles import VISUAL
from foveate.engine.presses import REFUSED, presses
from foveate.methods import Press, SnapKV
from foveate.models import anatomy
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import generate, logits
from tests.suite.kept import kept

needs_kvpress = pytest.mark.skipif(
    not all(map(find_spec, ("kvpress", "cachetools", "fire"))),
    reason="kvpress is not installed: pip install 'foveate[kvpress]', then pip install --no-deps kvpress",
)

SCORING = (
    "KnormPress",
    "SnapKVPress(window_size=4)",
    "SnapKVPress(window_size=6, kernel_size=3)",
    "StreamingLLMPress",
    "StreamingLLMPress(n_sink=2)",
    "ExpectedAttentionPress",
    "ExpectedAttentionPress(n_future_positions=9, n_sink=1, use_covariance=False, epsilon=0.01)",
    "TOVAPress",
    "KeyDiffPress",
    "LagKVPress(n_sink=2, lag_size=4, cross_scoring=True)",
    "CURPress",
    "CapPress",
    "NonCausalAttnPress",
    "LeverageScorePress",
    "CompactorPress(sink_size_start=2, sink_size_end=2, blending=0.4)",
    "RandomPress(seed=3)",
    "CriticalKVPress(KnormPress())",
    "CriticalKVPress(SnapKVPress(window_size=4), first_stage_ratio=0.3)",
)
CHOOSING = (
    "AdaKVPress(KnormPress())",
    "AdaKVPress(SnapKVPress(window_size=4), alpha_safeguard=0.5)",
    "CriticalAdaKVPress(ExpectedAttentionPress(use_vnorm=False))",
    "BlockPress(KnormPress(), block_size=4)",
    "ChunkPress(KnormPress(), chunk_length=8)",
    "ChunkKVPress(SnapKVPress(window_size=4), chunk_length=4)",
    "EntropyGatedChunkKVPress(KnormPress(), chunk_length=4, low_entropy_chunk_length=2)",
)
NUMBERS = ("ExpectedAttentionStatsPress", "KVzapPress", "LUKVPress", "QFilterPress")
"""Presses with numbers of their own for some checkpoints of text models."""


def held(recipe: Any, body: Body, samples: list[Any], sample: int = 0) -> list[list[list[int]]]:
    """Tokens that each head of each layer of a sample holds after the prompt, padding not counted."""
    model, inputs = body.model(), body.inputs(samples)
    with torch.no_grad(), foveate.attach(model, recipe) as session:
        cache = model(**inputs, use_cache=True).past_key_values
    there = inputs["attention_mask"][sample].nonzero()[:, 0]
    return kept(session, cache, sample, range(int(there[0]), int(there[-1]) + 1)).held


def hooked(text: str, keep: float, body: Body) -> list[list[list[int]]]:
    """What kvpress' own hooks keep of one prompt on the unmodified model, given the argument that they miss."""
    from foveate.engine.presses import build

    model, inputs, press = body.model(), body.inputs(ONE), build(text)
    with torch.no_grad():
        whole = model(**inputs, use_cache=True).past_key_values
    count = inputs["input_ids"].shape[1]
    press.compression_ratio = 1 - keep

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        torch.manual_seed(module.layer_idx)
        return press.forward_hook(module, args, kwargs | {"cache_position": torch.arange(count)}, output)

    language_model = anatomy(model).language_model
    for layer in language_model.layers:
        layer.self_attn.rotary_emb = language_model.rotary_emb
        layer.self_attn.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    found = []
    for layer, all_keys, left in zip(language_model.layers, whole.layers, cache.layers):
        same = (left.keys[0][:, :, None] == all_keys.keys[0][:, None]).all(-1).any(1)  # [Hkv, n]
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            same[masked[1], masked[2]] = False
        heads = [head.nonzero()[:, 0].tolist() for head in same]
        found.append(heads[:1] if all(head == heads[0] for head in heads) else heads)
    return found


@needs_kvpress
@pytest.mark.parametrize("text", [*SCORING, *CHOOSING])
def test_a_press_keeps_what_its_own_hooks_keep_on_a_model_that_they_know(text: str) -> None:
    body = BODIES["llava-clip"]

    assert held(Press(text, keep=0.6, tokens="all"), body, ONE) == hooked(text, 0.6, body)


@needs_kvpress
@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl", "qwen3_vl", "gemma3", "llava_next"])
@pytest.mark.parametrize("sample", range(len(RAGGED)))
def test_snapkv_by_either_way_is_the_same(name: str, sample: int) -> None:
    ours = held(SnapKV(keep=0.5, window=4, kernel=3), BODIES[name], RAGGED, sample)

    assert (
        held(Press("SnapKVPress(window_size=4, kernel_size=3)", keep=0.5, tokens="all"), BODIES[name], RAGGED, sample)
        == ours
    )


@needs_kvpress
@pytest.mark.parametrize("text", [*SCORING, *CHOOSING])
def test_a_sample_of_a_padded_batch_keeps_what_it_keeps_alone(text: str) -> None:
    body = BODIES["qwen2_5_vl"]
    method = Press(text, keep=0.5, tokens="all")
    for place in range(len(RAGGED)):
        assert held(method, body, RAGGED, place) == held_alone(method, body, place)


def held_alone(method: Press, body: Body, place: int) -> list[list[list[int]]]:
    model, inputs = body.model(), body.inputs(RAGGED, only=place)
    with torch.no_grad(), foveate.attach(model, method) as session:
        cache = model(**inputs, use_cache=True).past_key_values
    there = inputs["attention_mask"][0].nonzero()[:, 0]
    return kept(session, cache, 0, range(int(there[0]), int(there[-1]) + 1)).held


def visual(body: Body) -> set[int]:
    ids = body.inputs(ONE)["input_ids"][0]
    return set((ids == tiny.IMAGE).nonzero()[:, 0].tolist())


@needs_kvpress
@pytest.mark.parametrize("text", [*SCORING, *CHOOSING[:3]])
def test_of_pictures_only_the_budget_goes_and_all_text_stays(text: str) -> None:
    body = BODIES["llava-clip"]
    count, pictures = body.inputs(ONE)["input_ids"].shape[1], visual(body)
    for heads in held(Press(text, keep=6), body, ONE):
        heads = heads * (2 // len(heads) if text in CHOOSING else 1)
        assert all(set(range(count)) - pictures <= set(head) for head in heads)
        assert sum(len(pictures & set(head)) for head in heads) == 6 * len(heads)


@needs_kvpress
def test_knorm_keeps_the_shortest_keys() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with torch.no_grad():
        keys = [layer.keys[0] for layer in model(**inputs, use_cache=True).past_key_values.layers]
    expected = [by_hand(each, sorted(visual(body)), 5) for each in keys]

    assert [
        [sorted(visual(body) & set(head)) for head in layer] for layer in held(Press("KnormPress", keep=5), body, ONE)
    ] == expected


def by_hand(keys: Tensor, candidates: list[int], count: int) -> list[list[int]]:
    norms = keys[:, candidates].norm(dim=-1)
    return [sorted(candidates[at] for at in head.argsort()[:count].tolist()) for head in norms]


@needs_kvpress
def test_streaming_llm_keeps_both_ends() -> None:
    body = BODIES["llava-clip"]
    count = body.inputs(ONE)["input_ids"].shape[1]
    (first, *others) = held(Press("StreamingLLMPress(n_sink=3)", keep=11, tokens="all"), body, ONE)

    assert first == [[0, 1, 2, *range(count - 8, count)]]
    assert others == [first] * len(others)


@needs_kvpress
@pytest.mark.parametrize("name", ["llava-clip", "gemma3"])
def test_text_that_was_cached_before_the_picture_stays_and_is_not_shown(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(ONE)
    front = torch.arange(20, 27)[None]
    for tokens in ("visual", "all"):
        with torch.no_grad():
            cache = model(input_ids=front, use_cache=True).past_key_values
        with torch.no_grad(), foveate.attach(model, Press(keep=0.5, tokens=tokens)) as session:
            alone = kept_layers(session, model(**inputs, use_cache=True).past_key_values, 0, inputs)
            mask = torch.ones(1, 7 + inputs["input_ids"].shape[1], dtype=torch.long)
            cache = model(**inputs | {"attention_mask": mask}, past_key_values=cache, use_cache=True).past_key_values
        ledgers = [layer.ledger for layer in cache.layers if getattr(layer, "sliding_window", 0) is None]
        assert all(ledger.tokens(1, torch.device("cpu"))[0, :, :7].tolist() == [list(range(7))] * 2 for ledger in ledgers)
        behind = kept_layers(session, cache, 7, inputs)
        assert [[len(head) for head in layer] for layer in behind] == [[len(head) for head in layer] for layer in alone]


def kept_layers(session: Any, cache: Any, start: int, inputs: dict[str, Tensor]) -> list[list[list[int]]]:
    return kept(session, cache, 0, range(start, start + inputs["input_ids"].shape[1])).held


@needs_kvpress
def test_a_press_decodes_as_the_mask_of_its_choice() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    plain = logits(generate(model, inputs, 4))
    with foveate.attach(model, Press("TOVAPress", keep=3)) as session:
        output = generate(model, inputs, 4)
    assert not torch.allclose(logits(output)[:, 1:], plain[:, 1:])
    assert torch.equal(logits(output)[:, 0], plain[:, 0])  # the prompt itself is read whole
    assert int(session.trace.log[0][0].rows(*VISUAL).sum()) > 0


@needs_kvpress
def test_rows_that_pass_a_layer_by_are_shown_as_they_entered_it() -> None:
    body = BODIES["llava-clip"]
    (_, *frozen) = held(f"shortv(layers=(1, 2)) + {Press('KnormPress', keep=5)}", body, ONE)

    assert all(sum(token in visual(body) for token in head) == 5 for layer in frozen for head in layer)


@needs_kvpress
def test_every_press_is_known_here_to_run_or_refused_by_name() -> None:
    tested = {text.partition("(")[0] for text in (*SCORING, *CHOOSING)}

    assert set(presses()) == tested | set(NUMBERS) | set(REFUSED)


@needs_kvpress
@pytest.mark.parametrize("name", [*REFUSED, *NUMBERS])
def test_presses_that_cannot_run_are_refused_when_attached(name: str) -> None:
    with pytest.raises(FoveateError, match=rf"^press: press='{name}': ") as refused:
        foveate.attach(tiny.llava(), Press(name))
    assert "\n" not in str(refused.value)


@needs_kvpress
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("SnapKVPres", "kvpress has no 'SnapKVPres'; did you mean 'SnapKVPress'?"),
        ("3", "must be a press, such as 'SnapKVPress"),
        ("snap kv", "must be a press, such as 'SnapKVPress"),
        ("KnormPress(width=3)", "KnormPress: .*unexpected keyword argument 'width'"),
        ("AdaKVPress", "AdaKVPress: .*missing 1 required positional argument: 'press'"),
        ("SnapKVPress(window_size=f())", "kvpress has no 'f'"),
        ("SnapKVPress(window_size=1 + x)", "options must be numbers, text"),
        ("AdaKVPress(ThinKPress())", "ThinKPress zeroes parts of keys"),
    ],
)
def test_what_is_no_press_is_refused_by_name(text: str, line: str) -> None:
    with pytest.raises(FoveateError, match=f"^press: press=.*: {line}"):
        foveate.attach(tiny.llava(), Press(text))


@needs_kvpress
def test_families_that_turn_otherwise_are_refused_for_presses_that_turn_queries() -> None:
    model = BODIES["qwen3_5"].model()
    with pytest.raises(
        FoveateError, match=r"SnapKVPress.*: turns queries, for which qwen3_5 pairs other numbers than kvpress"
    ):
        foveate.attach(model, Press("SnapKVPress(window_size=4)"))
    foveate.attach(model, Press("CURPress")).detach()


@needs_kvpress
def test_a_prompt_too_short_for_a_press_is_refused() -> None:
    body = BODIES["llava-clip"]
    with pytest.raises(FoveateError, match="27 tokens: Query length 27 should be greater than the window size 64; give it"):
        held(Press("SnapKVPress"), body, ONE)


def test_chunks_of_pictures_alone_are_refused() -> None:
    with pytest.raises(FoveateError, match="tokens='visual': ChunkPress takes chunks of text and pictures alike"):
        Press("ChunkPress(KnormPress())", tokens="visual")
    with pytest.raises(FoveateError, match="tokens=None: stands for 'visual' on this model, and ChunkPress takes chunks"):
        foveate.attach(tiny.llava(), Press("ChunkPress(KnormPress())"))


def test_without_the_library_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kvpress", None)
    with pytest.raises(FoveateError, match=r"^press: press='KeyDiffPress': needs kvpress, .*pip install --no-deps kvpress$"):
        foveate.attach(tiny.llava(), Press())
