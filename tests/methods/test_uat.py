"""UAT: the card's arithmetic, the bandit, its exits against a model run by hand, and its numbers."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import foveate
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.engine.calibrate import calibrate
from foveate.methods import UAT
from foveate.methods.in_llm.uat import Bandit, exit_loss, predicting, reliability, reward, upper_bound
from foveate.models import anatomy
from tests.methods.bodiless import layout
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.conversation import generate, logits
from tests.suite.pairs import artifacts, refusal

BODY = BODIES["llava-clip"]
SOME = 0.052
"""A threshold that some tokens of the tiny model reach."""


# By hand.


def test_the_rewards_of_the_worked_example() -> None:
    confidence, reliable = torch.tensor([0.5, 0.7, 0.92, 0.97]), torch.tensor([0.3, 0.6, 0.9, 0.95])
    rewards = [reward(confidence[i], reliable[i], i + 1, 0.4 / 4).item() for i in range(4)]

    assert rewards == pytest.approx([0.05, 0.22, 0.528, 0.5215], abs=1e-6)
    for tau, layers in ((0.4, 1), (0.6, 2), (0.9, 3), (0.95, 4)):
        assert int((confidence >= tau).int().argmax()) + 1 == layers


def test_the_upper_bounds_of_the_worked_example() -> None:
    assert upper_bound([0.5, 0.6], [10, 2], 2**0.5) == pytest.approx([1.2050, 2.1764], abs=1e-4)


def test_the_losses_of_the_worked_example() -> None:
    for entropy, reliable, expected in ((2.0, 0.1, 2.2), (0.1, 0.9, 0.19)):
        assert exit_loss(torch.tensor([entropy]), torch.tensor([reliable]), 0.0).item() == pytest.approx(expected)
    assert exit_loss(torch.zeros(2), torch.tensor([0.3, 0.7]), 0.8).item() == pytest.approx(0.09)


def test_reliability_is_linear_in_probabilities_and_depth_before_its_sigmoid() -> None:
    probabilities, weight = torch.tensor([[0.9, 0.1], [0.5, 0.5]]), torch.tensor([2.0, -1.0, 4.0, 0.5])
    expected = torch.tensor([2 * 0.9 - 0.1 + 4 * 0.25 + 0.5, 0.5 + 4 * 0.25 + 0.5]).sigmoid()

    assert_close(reliability(probabilities, 0.25, weight), expected)


def test_no_price_for_layers_prefers_the_most_reliable_exit_and_a_high_one_the_first() -> None:
    confidence, reliable = torch.tensor([0.8, 0.8, 0.8]), torch.tensor([0.5, 0.9, 0.7])

    def best(lam: float) -> int:
        return int(torch.stack([reward(confidence[i], reliable[i], i + 1, lam) for i in range(3)]).argmax())

    assert (best(0.0), best(1.0)) == (1, 0)


# The bandit.


def pulled(bandit: Bandit, means: list[float], times: int) -> list[int]:
    chosen = []
    for _ in range(times):
        chosen.append(bandit.choose())
        bandit.learn(chosen[-1], means[chosen[-1]])
    return chosen


@given(st.lists(st.floats(-0.1, 1), min_size=1, max_size=9), st.integers(0, 60))
def test_each_arm_is_pulled_once_first_and_values_are_means(means: list[float], more: int) -> None:
    bandit, count = Bandit(range(len(means)), 2**0.5), len(means)
    chosen = pulled(bandit, means, count + more)

    assert chosen[:count] == list(range(count))
    assert sum(bandit.pulls) == count + more
    assert bandit.pulls == [chosen.count(arm) for arm in range(count)]
    assert bandit.values == pytest.approx(means)


def test_values_are_running_means() -> None:
    bandit = Bandit((0.5,), 1.0)
    for gained in (0.1, 0.4, -0.2):
        bandit.learn(0, gained)

    assert bandit.values == [pytest.approx(0.1)]


def test_the_best_arm_is_pulled_ever_more_often_and_another_one_once_it_is_better() -> None:
    bandit, means = Bandit((0.1, 0.5, 0.9), 0.3), [0.2, 0.5, 0.3]
    pulled(bandit, means, 1000)
    assert bandit.pulls[1] > 900

    later = pulled(bandit, [0.2, 0.1, 0.8], 4000)[-500:]
    assert later.count(2) > 450


def test_what_a_bandit_knows_goes_into_a_file_and_comes_back() -> None:
    bandit = Bandit((0.5, 0.9), 1.0)
    pulled(bandit, [0.3, 0.6], 20)
    other = Bandit((0.5, 0.9), 1.0)
    other.restore(json.loads(json.dumps(bandit.state())))

    assert other.state() == bandit.state()
    with pytest.raises(FoveateError, match=r"uat: arms=\[0.5, 0.9\]: the state is of these; must be .*\(0.7,\)"):
        Bandit((0.7,), 1.0).restore(bandit.state())


# Exits, on a tiny model.


class ByHand:
    """A LLaVA over Llama layers that is run layer by layer, with exits."""

    def __init__(self, model: Any, tau: float, numbers: Any, layers: tuple[int, ...]) -> None:
        self.model, self.tau, self.numbers, self.exits = model, tau, numbers, layers
        self.cache = DynamicCache()
        self.left: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        """Logits ``[V]`` behind the rows ``x`` ``[1, n, D]``."""
        parts, past = self.model.model.language_model, self.cache.get_seq_length()
        positions = torch.arange(past, past + x.shape[1])[None]
        rope = parts.rotary_emb(x, positions)
        ends = None
        for number, layer in enumerate(parts.layers):
            if number in self.exits and ends is None:
                which = self.numbers["layers"].index(number)
                down, up, bias = (self.numbers[name][which].double() for name in ("down", "up", "bias"))
                state = x[:, -1:] + x[:, -1:] @ down.T @ up.T + bias
                if float(self.model.lm_head(parts.norm(state)).softmax(-1).max()) >= self.tau:
                    ends, at = state, number
            if ends is None:
                x = layer(x, attention_mask=None, position_embeddings=rope, past_key_values=self.cache)
                continue
            normed, attention = layer.input_layernorm(x), layer.self_attn
            key, value = (
                part(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
                for part in (attention.k_proj, attention.v_proj)
            )
            self.cache.update(apply_rotary_pos_emb(key, key, *rope)[1], value, number)
        self.left.append(len(parts.layers) if ends is None else at)
        return self.model.lm_head(parts.norm(x[:, -1:] if ends is None else ends))[0, -1]  # type: ignore[no-any-return]


def numbers() -> Any:
    return next(artifact for artifact in artifacts(BODY) if artifact.method == "uat").numbers


@torch.no_grad()
def test_sixteen_steps_are_those_of_a_model_run_by_hand() -> None:
    model = BODY.model().double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in BODY.inputs(ONE).items()}
    with foveate.attach(model, UAT(tau=SOME), artifacts=artifacts(BODY)) as session:
        output = generate(model, inputs)
        report = session.report
    hand = ByHand(model, SOME, numbers(), (1, 2, 3))
    prompt, depth = inputs["input_ids"].shape[1], len(model.model.language_model.layers)
    embedded = model(**inputs, output_hidden_states=True).hidden_states[0]
    made = [hand.forward(embedded)]
    for token in output.sequences[0, prompt:-1]:
        made.append(hand.forward(model.get_input_embeddings()(token[None, None])))

    assert_close(logits(output)[0], torch.stack(made).float(), rtol=1e-6, atol=1e-6)
    assert len(set(hand.left)) > 1, "some leave and others do not"
    assert report.layers == pytest.approx(sum(hand.left) / (16 * depth))
    for mine, theirs in zip(output.past_key_values.layers, hand.cache.layers):
        assert mine.keys.shape == theirs.keys.shape
        assert_close(mine.keys, theirs.keys)
        assert_close(mine.values, theirs.values)


@pytest.mark.parametrize("samples", [ONE, RAGGED], ids=["one", "ragged"])
def test_above_every_confidence_the_answer_is_the_full_models_to_the_last_bit(samples: Any) -> None:
    model, inputs = BODY.model(), BODY.inputs(samples)
    plain = logits(generate(model, inputs))
    for tau in (1.0, 1.01):
        with foveate.attach(model, UAT(tau=tau), artifacts=artifacts(BODY)) as session:
            assert torch.equal(logits(generate(model, inputs)), plain)
            assert session.report.layers == 1
            assert session.report.idle == (f"uat(tau={tau})",)


def test_what_has_left_runs_through_no_layer_but_has_keys_and_values_there() -> None:
    model, inputs, ran = BODY.model(), BODY.inputs(RAGGED), dict[tuple[int, str], int]()
    with foveate.attach(model, UAT(tau=0.0, layers=(2,)), artifacts=artifacts(BODY)) as session:
        for number, layer in enumerate(model.model.language_model.layers):
            for part in ("mlp", "self_attn"):

                def count(module: Any, args: Any, kwargs: Any, place: tuple[int, str] = (number, part)) -> None:
                    ran[place] = ran.get(place, 0) + 1

                getattr(layer, part).register_forward_pre_hook(count, with_kwargs=True)
        output = generate(model, inputs, 8)

    assert ran == {(layer, part): 8 for layer in (0, 1) for part in ("mlp", "self_attn")}
    assert session.report.layers == 0.5
    assert session.report.active[2:] == (0, 0)
    assert {layer.keys.shape[2] for layer in output.past_key_values.layers} == {inputs["input_ids"].shape[1] + 7}


def test_a_higher_threshold_never_leaves_earlier() -> None:
    model, inputs, shares = BODY.model(), BODY.inputs(ONE), []
    for tau in (0.0, 0.04, 0.045, 0.05, 0.055, 0.06, 0.07, 1.0):
        with torch.no_grad(), foveate.attach(model, UAT(tau=tau), artifacts=artifacts(BODY)) as session:
            model(**inputs)
            shares.append(session.report.layers)

    assert shares == sorted(shares)
    assert (shares[0], shares[-1]) == (0.25, 1)


@pytest.mark.parametrize("tau", [0.04, SOME, 0.06])
def test_answers_are_the_same_without_a_cache(tau: float) -> None:
    model = BODY.model().double()
    inputs = {name: x.double() if x.is_floating_point() else x for name, x in BODY.inputs(RAGGED).items()}
    with foveate.attach(model, UAT(tau=tau), artifacts=artifacts(BODY)):
        cached, plain = (logits(generate(model, inputs, 8, use_cache=use)) for use in (True, False))

    assert_close(plain, cached, rtol=1e-6, atol=1e-6)


def test_candidates_that_are_tried_out_run_on() -> None:
    model, inputs = BODY.model(), BODY.inputs(ONE)
    plain = generate(model, inputs, 8).sequences
    with foveate.attach(model, UAT(tau=1.0), artifacts=artifacts(BODY)):
        assert torch.equal(generate(model, inputs, 8, prompt_lookup_num_tokens=3).sequences, plain)


# Its memory.


def test_every_forward_is_a_sample_of_the_bandit() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    with foveate.attach(model, UAT(arms=(0.04, SOME, 0.06)), artifacts=artifacts(BODY)) as session:
        bandit = session.remembered("uat")
        generate(model, inputs, 2)
        assert bandit.pulls == [1, 1, 0]
        generate(model, inputs, 10)
        assert sum(bandit.pulls) == 12
    with foveate.attach(model, UAT(tau=0.5), artifacts=artifacts(BODY)) as session:
        assert session.remembered("uat") is None


@torch.no_grad()
def test_a_batch_is_rewarded_with_the_mean_of_what_its_samples_are() -> None:
    model, recipe, given = BODY.model(), UAT(arms=(SOME,)), numbers()
    with foveate.attach(model, recipe, artifacts=artifacts(BODY)) as session:
        bandit, before, alone = session.remembered("uat"), 0.0, []
        for place in range(len(RAGGED)):
            output = model(**BODY.inputs(RAGGED, only=place)).logits[0, -1].softmax(-1)
            alone.append(bandit.values[0] * (place + 1) - before)
            before = bandit.values[0] * (place + 1)
            ran = round(session.report.layers * 4)
            expected = reward(output.max(), reliability(output, ran / 4, given["reliability"]), ran, 0.1 / 4)
            assert alone[-1] == pytest.approx(float(expected), abs=1e-5)
        model(**BODY.inputs(RAGGED))

    assert bandit.values[0] * 4 - before == pytest.approx(sum(alone) / 3, abs=1e-5)


def test_a_forward_that_fails_teaches_the_bandit_nothing() -> None:
    model, inputs = BODY.model(), BODY.inputs(ONE)

    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    with foveate.attach(model, UAT(arms=(0.9, SOME)), artifacts=artifacts(BODY)) as session:
        handle = model.model.language_model.layers[2].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            generate(model, inputs, 2)
        assert session.remembered("uat").pulls == [0, 0]
        handle.remove()
        generate(model, inputs, 2)
        assert session.remembered("uat").pulls == [1, 1]


def test_threads_share_a_bandit() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    with foveate.attach(model, UAT(arms=(0.04, SOME)), artifacts=artifacts(BODY)) as session:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: generate(model, inputs, 4), range(8)))
        assert sum(session.remembered("uat").pulls) == 32


# What it needs, and what it cannot stand beside.


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("uat + snapkv(keep=0.5)", r"uat \+ snapkv: snapkv owns the cache, and from layer 1 on rows may have left"),
        ("uat + fastv(keep=6)", r"uat \+ fastv: fastv acts before decoder layer 2, and from layer 1 on"),
        ("uat(layers=(2,)) + shortv(layers=(2,))", r"uat \+ shortv: shortv routes decoder layer 2"),
        ("uat + uat(tau=0.5)", r"uat \+ uat: both let rows leave early"),
        ("uat(layers=(4,))", r"uat: layers=\(4,\): must be in 1..3"),
        ("uat(rank=3)", r"artifact of uat: made with rank=None"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str, reason: str) -> None:
    with pytest.raises(FoveateError, match=reason):
        foveate.attach(BODY.model(), recipe, artifacts=artifacts(BODY))


def test_exits_that_were_not_trained_are_refused() -> None:
    model = BODY.model()
    known = [replace(a, numbers={**a.numbers, "layers": [1]}) for a in artifacts(BODY) if a.method == "uat"]
    with pytest.raises(FoveateError, match=r"uat: layers=\(2, 3\): has exit heads at \(1,\) only; calibrate"):
        foveate.attach(model, UAT(layers=(2, 3)), artifacts=known)
    with pytest.raises(FoveateError, match=r"uat: needs exit heads trained on this model; run `foveate calibrate uat`"):
        foveate.attach(model, "uat")
    assert "sliding attention" in str(refusal(UAT(), BODIES["gemma3"]))
    assert "recurrent state" in str(refusal(UAT(), BODIES["qwen3_5"]))


def test_no_threshold_at_all_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"uat: arms=\(\): must be at least one threshold"):
        UAT(arms=())


def test_what_acts_before_the_first_exit_may_stand_beside_it() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    recipe = f"fastv(keep=6, layer=2) + shortv(layers=(1,)) + uat(tau={SOME}, layers=(2, 3))"
    with foveate.attach(model, recipe, artifacts=artifacts(BODY)) as session:
        generate(model, inputs)

    assert session.report.visual_tokens[2:] == (6, 6)
    assert session.report.layers < 1


# Training.


def labelled(seed: int = 0) -> dict[str, Tensor]:
    inputs = BODY.inputs(RAGGED, seed=seed)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    return {**inputs, "labels": labels}


def test_rows_that_predict_are_those_in_front_of_answers() -> None:
    text = layout("tiiitt")
    assert predicting(text).tolist() == [[False, False, False, False, False, True]]
    role = text.role.clone()
    role[0, 4:] = 6
    told: Layout = replace(text, role=role, answers=(2,))
    assert predicting(told).tolist() == [[False, False, False, True, True, False]]


@pytest.mark.parametrize("target", ["model", "answer"])
def test_trained_exit_heads_agree_better_with_what_is_right(target: Any) -> None:
    model, batches = BODY.model(), [labelled(seed) for seed in range(4)]
    made: dict[int, Artifact] = {}
    for steps in (0, 100):
        made[steps] = calibrate(UAT(target=target, steps=steps, rate=1e-2, rank=4), model, batches)
    found = made[100].numbers

    assert {name: tuple(found[name].shape) for name in ("down", "up", "bias", "reliability")} == {
        "down": (3, 4, found["bias"].shape[1]),
        "up": (3, found["bias"].shape[1], 4),
        "bias": (3, found["bias"].shape[1]),
        "reliability": (anatomy(model).config.vocab_size + 2,),
    }
    assert not made[0].numbers["up"].any()
    if target == "model":
        agreement = [[v for name, v in of.numbers.items() if "agreement" in name] for of in made.values()]
        assert sum(agreement[1]) > sum(agreement[0])
    with foveate.attach(model, UAT(target=target, steps=100, rate=1e-2, rank=4), artifacts=[made[100]]):
        generate(model, BODY.inputs(ONE), 4)


def test_training_leaves_no_gradients_and_needs_no_answers() -> None:
    model = BODY.model()
    calibrate(UAT(steps=3), model, [BODY.inputs(RAGGED)])

    assert all(parameter.grad is None for parameter in model.parameters())


def test_answers_with_gaps_are_refused() -> None:
    batch = labelled()
    batch["labels"][0, -2] = -100
    with pytest.raises(FoveateError, match="uat: some words of an answer have no label"):
        calibrate(UAT(steps=1), BODY.model(), [batch])
