"""Linears that depend on what a row is, in a session: each row gets its role's, whatever drops, merges or routes rows."""

from __future__ import annotations

import threading
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import foveate
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.engine.export import export
from foveate.engine.quantize import quantize
from foveate.methods import MASQuant
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.conversation import generate, logits
from tests.suite.oracle import noting
from tests.suite.pairs import lent, parts
from tests.suite.test_methods import CLOSE, double, oracle

METHOD = "masquant(bits=4, activations=8, epochs=0)"


@cache
def made(name: str) -> Artifact:
    body = BODIES[name]
    return quantize(parts(body).model, METHOD, [body.inputs(RAGGED)])


def needed(name: str, model: Any) -> list[Artifact]:
    return [*(each for each in lent(BODIES[name], model) if each.method != "masquant"), made(name)]


RECIPES = [
    "hiprune(keep=6) + snapkv(keep=0.5, window=4)",
    "fastv(layer=2, keep=5)",
    "tome(keep=6)",
    "shortv(layers=(1, 2))",
    "alvts(keep=0.4)",
    "uat(tau=0.052)",
    "dtr(keep=6)",
    "pyramiddrop(layers=(1, 3), ratios=(0.5, 0.3))",
    "streamingllm(keep=12)",
    "visionzip(keep=5) + prefixkv(keep=0.6)",
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(
    "name",
    ["llava-clip", pytest.param("qwen2_5_vl", marks=pytest.mark.slow), pytest.param("gemma3", marks=pytest.mark.slow)],
)
def test_rows_that_go_take_nobody_elses_role(name: str, recipe: str) -> None:
    body = BODIES[name]
    artifacts = needed(name, body.model())
    # Rounded activations fall to the other side where sums are rounded otherwise; hardly ever in float64.
    model, inputs = body.model().double(), double(body.inputs(RAGGED))
    prompt = inputs["input_ids"].shape[1]
    try:
        session = foveate.attach(model, f"{METHOD} + {recipe}", artifacts=artifacts)
    except FoveateError as error:  # sites and layers that a family has not
        assert name != "llava-clip"
        pytest.skip(str(error))
    with noting() as notes, session:
        output = generate(model, inputs, 8)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    expected = oracle(model, whole, session, notes)
    torch.testing.assert_close(logits(output), expected[:, prompt - 1 :].float(), **CLOSE)  # as `generate` gives them


def test_pictures_are_not_taken_for_text_nor_text_for_pictures() -> None:
    body = BODIES["llava-clip"]
    model, artifact = body.model(), made("llava-clip")
    blind = Artifact(
        "masquant",
        artifact.fingerprint,
        {name: value for name, value in artifact.numbers.items() if ".role" not in name},
        artifact.parameters,
    )
    shown, told = body.inputs(ONE), body.inputs([(9, 0, 6)])
    found = []
    for each in (artifact, blind):
        with foveate.attach(model, METHOD, artifacts=[each]):
            found.append((generate(model, shown, 4), generate(model, told, 4)))
    assert torch.equal(logits(found[0][1]), logits(found[1][1]))
    assert not torch.allclose(logits(found[0][0]), logits(found[1][0]), atol=1e-4)


def test_a_step_is_text_whatever_was_before_it() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with foveate.attach(model, METHOD, artifacts=[made("llava-clip")]):
        output = generate(model, inputs, 6)
        prompt = inputs["input_ids"].shape[1]
        whole = body.extended(inputs, output.sequences[:, prompt:-1])
        at_once = model(**whole).logits[:, prompt - 1 :]
        torch.testing.assert_close(logits(output), at_once, **CLOSE)
        parted = generate(model, inputs, 6, use_cache=True, prefill_chunk_size=prompt - 5)  # behind the picture
        torch.testing.assert_close(logits(parted), logits(output), **CLOSE)
        guessed = generate(model, inputs, 6, prompt_lookup_num_tokens=3)
        assert torch.equal(guessed.sequences, output.sequences)


def test_threads_have_rows_of_their_own() -> None:
    body = BODIES["llava-clip"]
    model, prompts = body.model(), [body.inputs(RAGGED), body.inputs([(12, 0, 9)]), body.inputs(ONE)]
    with foveate.attach(model, METHOD, artifacts=[made("llava-clip")]):
        alone = [generate(model, inputs, 4).sequences for inputs in prompts]
        found: list[Any] = [None] * 6

        def run(place: int) -> None:
            found[place] = generate(model, prompts[place % 3], 4).sequences

        threads = [threading.Thread(target=run, args=(place,)) for place in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(one, alone[place % 3]) for place, one in enumerate(found))


@torch.no_grad()
def test_a_part_of_the_model_that_is_called_by_itself_is_refused_in_a_line() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    x = torch.randn(1, 6, 48)
    plain = model.model.language_model(inputs_embeds=x).last_hidden_state
    before = dict(model.named_modules())
    with foveate.attach(model, METHOD, artifacts=[made("llava-clip")]):
        own = model(**inputs).logits
        layer = model.model.language_model.layers[0]
        for call in (
            lambda: model.model.language_model(inputs_embeds=x),
            lambda: layer.self_attn.q_proj(x),
            lambda: layer.mlp(x[:, :1]),
        ):
            with pytest.raises(FoveateError) as raised:
                call()
            assert str(raised.value) == (
                "masquant: what its linears make depends on what each row is, which a part of the model called by itself "
                "cannot say; call the model or its generate"
            )
        assert torch.equal(model(**inputs).logits, own)
    assert dict(model.named_modules()) == before
    assert torch.equal(model.model.language_model(inputs_embeds=x).last_hidden_state, plain)


def test_presses_are_refused_by_name() -> None:
    pytest.importorskip("kvpress")
    model = BODIES["llava-clip"].model()
    with pytest.raises(FoveateError, match=r"masquant \+ press: the press runs projections on rows of its choice"):
        foveate.attach(
            model, f"{METHOD} + press(press='SnapKVPress(window_size=4)', keep=0.5)", artifacts=[made("llava-clip")]
        )
    assert "_foveate_session" not in vars(model)


def test_an_export_is_refused_with_the_reason(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model = BODIES["llava-clip"].model()
    with pytest.raises(FoveateError, match=r"masquant: adds to the products .* use the artifact with attach"):
        export(model, made("llava-clip"), tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_artifact_is_saved_and_found_again(tmp_path: Path) -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    recipe = Recipe.of(f"{METHOD} + hiprune(keep=6) + snapkv(keep=0.5, window=4)")
    assert isinstance(recipe.methods[0], MASQuant)
    made("llava-clip").save(tmp_path / "masquant.json")
    found = []
    for artifacts in ([made("llava-clip")], tmp_path):
        with foveate.attach(model, recipe, artifacts=artifacts) as session:
            found.append(generate(model, inputs, 4))
    assert torch.equal(logits(found[0]), logits(found[1]))
    sides = made("llava-clip").numbers["size"]["sides"]
    assert sides > 0
    assert session.report.weight_bytes > sides
