"""MoDES: the card's arithmetic, what is never skipped, and its numbers on a tiny mixture of experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import foveate
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.recipe import Recipe
from foveate.core.roles import Role
from foveate.core.signal import Ids, Numbers
from foveate.core.state import State
from foveate.engine.calibrate import Calibration, calibrate
from foveate.engine.run import Run
from foveate.methods import MoDES
from foveate.methods.in_llm.modes import frontier, grid, modalities, normalised, skipped
from foveate.models import anatomy
from foveate.ops.divergence import divergence
from tests.methods.bodiless import layout
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.conversation import generate, logits
from tests.suite.pairs import artifacts

BODY = BODIES["qwen3_vl_moe"]
SPARSE = (0, 2, 3, 4)
SKIPS = [[0, 0.3, 0.5], [0.2, 0.5, 0.7], [0.4, 0.6, 0.9]]
LOSSES = [[0, 0.10, 0.40], [0.20, 0.25, 0.50], [0.60, 0.70, 0.90]]
QUICK = MoDES(skip=0.4, points=5, reach_text=1.0, reach_vision=1.0)


def labelled(samples: Any = RAGGED, seed: int = 0) -> dict[str, Tensor]:
    """Prompts whose last two words are an answer."""
    inputs = BODY.inputs(samples, seed=seed)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    return {**inputs, "labels": labels}


# By hand.


@pytest.mark.parametrize(
    ("kind", "expected"), [("t", [False, False, True]), ("1", [False, True, True])], ids=["text", "vision"]
)
def test_the_worked_example(kind: str, expected: list[bool]) -> None:
    text = torch.tensor(kind == "t")
    drop = skipped(torch.tensor([0.5, 0.3, 0.2]), text, ~text, (0.5, 0.5), (0.12, 0.2))

    assert drop.tolist() == expected


def test_weights_are_compared_as_shares_of_their_sum() -> None:
    text = torch.tensor(True)
    drop = skipped(torch.tensor([5.0, 3.0, 2.0]), text, ~text, (0.5, 0.5), (0.12, 0.2))

    assert drop.tolist() == [False, False, True]


def test_what_is_at_the_threshold_runs() -> None:
    text = torch.tensor(True)

    assert not skipped(torch.tensor([0.75, 0.25]), text, ~text, (0.5, 0.5), (0.125, 0.125)).any()


def test_the_search_of_the_worked_example() -> None:
    best, tried = frontier(lambda row, column: (SKIPS[row][column], LOSSES[row][column]), 3, 3, 0.5)

    assert best == (1, 1)
    assert tried[best] == (0.5, 0.25)
    assert list(tried) == [(2, 2), (0, 2), (0, 1), (1, 1), (1, 0), (2, 0), (2, 1)]


def test_a_share_that_no_threshold_skips_is_not_found() -> None:
    best, tried = frontier(lambda row, column: (SKIPS[row][column], LOSSES[row][column]), 3, 3, 0.95)

    assert (best, list(tried)) == ((-1, -1), [(2, 2)])


rising = st.lists(st.floats(0.01, 1), min_size=1, max_size=6)


@given(rising, rising, rising, rising, st.floats(0.05, 0.95))
def test_the_search_finds_the_best_of_all_cells(
    a: list[float], b: list[float], c: list[float], d: list[float], rho: float
) -> None:
    rows, columns = min(len(a), len(c)), min(len(b), len(d))
    skip, loss = (
        torch.tensor(x[:rows]).cumsum(0)[:, None] + torch.tensor(y[:columns]).cumsum(0) for x, y in ((a, b), (c, d))
    )
    skip = skip / skip.max()
    best, tried = frontier(lambda i, j: (skip[i, j].item(), loss[i, j].item()), rows, columns, rho)

    assert tried[best][1] == loss[skip >= rho].min().item()
    assert len(tried) <= 2 * rows + columns + 1


def test_the_grid_of_thresholds() -> None:
    assert grid(100, 0.71)[0] == pytest.approx(9.0796e-5, abs=1e-9)
    assert grid(100, 0.71)[-1] == pytest.approx(0.104307, abs=1e-6)
    assert grid(100, 0.6)[-1] == pytest.approx(0.035972, abs=1e-6)
    assert grid(3, 1.0)[-1] == 1
    assert len(grid(100, 0.6)) == 100


def test_factors_add_up_to_one() -> None:
    assert normalised([1.0, 3.0]) == [0.25, 0.75]
    assert normalised([0.0, 0.0]) == [0.5, 0.5]


# Whose experts are skipped.


def test_special_tokens_padding_and_rows_put_in_are_neither_text_nor_vision() -> None:
    prompts = layout("tt11ttt", "..t1ttt")
    inserted = prompts.role.clone()
    inserted[0, 3], inserted[0, 6], inserted[1, 6] = int(Role.INSERTED), int(Role.ANSWER), int(Role.AUDIO)
    prompts = replace(prompts, role=inserted)
    ids = torch.tensor([[1, 20, 7, 7, 8, 21, 22], [20, 20, 2, 7, 23, 24, 6]])
    text, vision = modalities(ids, prompts, torch.tensor([1, 2, 7, 8]))

    assert text.int().tolist() == [[0, 1, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 0]]
    assert vision.int().tolist() == [[0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 1, 0, 0, 0]]


def weigh(method: MoDES, weights: Tensor, prompts: Layout) -> Tensor:
    numbers = {"factors": torch.tensor([[0.5, 0.25]]), "thresholds": [0.1, 0.1], "special": torch.tensor([1])}
    ids = torch.full(prompts.shape, 20)
    ids[:, 0] = 1
    return method.weigh(0, weights, torch.zeros(0), prompts, {Ids(): ids, Numbers("modes"): numbers}, State())


@settings(deadline=None)
@given(st.floats(0, 0.5), st.floats(0, 0.5), st.floats(0, 0.5), st.integers(0, 9))
def test_more_is_skipped_the_higher_a_threshold_and_each_only_touches_its_own(
    a: float, b: float, vision: float, seed: int
) -> None:
    prompts = layout("tt111tt", "..t11tt")
    weights = torch.rand(2, 7, 4, generator=torch.Generator().manual_seed(seed)).softmax(-1)
    low, high = (weigh(MoDES(tau_text=tau, tau_vision=vision), weights, prompts) for tau in sorted((a, b)))
    shown = prompts.rows(Role.IMAGE)

    assert ((high == 0) >= (low == 0)).all()
    assert torch.equal(high[shown], low[shown])
    assert torch.equal(high[:, 0], weights[:, 0])  # special, or padding
    assert torch.equal(high[high != 0], weights[high != 0])


# On a model.


def attach(model: Any, method: MoDES, *others: str) -> foveate.Session:
    recipe = Recipe((method, *(m for other in others for m in Recipe.of(other).methods)))
    return foveate.attach(model, recipe, artifacts=artifacts("qwen3_vl_moe"))


def test_at_thresholds_of_zero_every_bit_is_the_models() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    plain = logits(generate(model, inputs, 6))
    for method in (MoDES(tau_text=0.0, tau_vision=0.0), MoDES(tau_text=0.0, tau_vision=1e-30)):
        with attach(model, method) as session:
            assert torch.equal(logits(generate(model, inputs, 6)), plain)
        assert session.report.flops == session.report.flops_unmodified
        assert session.report.experts == 1


def test_beyond_every_factor_only_special_tokens_have_experts() -> None:
    """Of the suite's ids 1, 8, 9 and 20 are special: the first of the prompt, and the last but one here."""
    model, inputs = BODY.model(), BODY.inputs(ONE)
    inputs["input_ids"][0, -2] = 20
    special = torch.isin(inputs["input_ids"], torch.tensor([1, 8, 9, 20]))
    rows: list[Tensor] = []
    calls: list[int] = []
    block, experts = anatomy(model).layers[3].mlp, anatomy(model).experts(3)
    original = experts.forward
    experts.forward = lambda *args: calls.append(len(args[0])) or original(*args)
    block.register_forward_hook(lambda module, args, output: rows.append(output))
    with attach(model, MoDES(tau_text=2.0, tau_vision=2.0)) as session:
        calls.clear()  # attaching watches a layer
        rows.clear()
        cache = model(**inputs).past_key_values
        report = session.report
        assert torch.equal((rows.pop() != 0).any(-1), special)
        assert calls == [3 * int(special.sum())]
        model(input_ids=torch.tensor([[30]]), past_key_values=cache)
        assert not rows.pop().any()
        assert len(calls) == 1  # a step of text has no experts at all
        model(input_ids=torch.tensor([[20]]), past_key_values=cache)
        assert rows.pop().any()
        assert len(calls) == 2
    config = model.config.text_config
    gone = 3 * int((~special).sum()) * len(SPARSE)
    assert report.experts == pytest.approx(float(special.float().mean()))
    assert report.flops_unmodified - report.flops == gone * 6 * config.hidden_size * config.moe_intermediate_size


def test_fewer_pairs_of_row_and_expert_run_in_prompt_and_steps() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    experts = anatomy(model).experts(2)
    original, pairs = experts.forward, list[int]()
    experts.forward = lambda *args: pairs.append(args[1].numel()) or original(*args)
    generate(model, inputs, 3)
    plain = pairs.copy()
    with attach(model, MoDES()):
        pairs.clear()
        generate(model, inputs, 3)
    assert len(plain) == len(pairs) == 3
    assert all(fewer < all_ for fewer, all_ in zip(pairs, plain))


def test_dropped_rows_take_their_ids_with_them() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    seen: list[tuple[Tensor, Layout]] = []
    weigh = MoDES.weigh

    def spy(self: MoDES, layer: int, weights: Tensor, index: Tensor, layout: Layout, *rest: Any) -> Tensor:
        seen.append((rest[0][Ids()], layout))
        return weigh(self, layer, weights, index, layout, *rest)

    with pytest.MonkeyPatch.context() as patch, attach(model, MoDES(), "folder(keep=6)", "fastv(layer=3, keep=3)"):
        patch.setattr(MoDES, "weigh", spy)
        model(**inputs)
    widths = [ids.shape[1] for ids, _ in seen]
    assert widths[0] == widths[1] > widths[2] == widths[3]  # layers 0, 2 | 3, 4
    assert widths[0] < inputs["input_ids"].shape[1]
    for ids, rows in seen:
        there = rows.valid
        assert torch.equal(ids[there], inputs["input_ids"].gather(1, rows.origin.clamp(min=0))[there])


# Its numbers.


class Steps:
    """Counts what a calibration says."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.done = 0

    def begin(self, what: str, steps: int) -> None:
        self.begun.append((what, steps))

    def advance(self) -> None:
        self.done += 1


@pytest.fixture(scope="module")
def made() -> Artifact:
    return calibrate(QUICK, BODY.model(), [labelled(), labelled(seed=1)], special=[30])


def test_numbers_are_found_and_followed(made: Artifact) -> None:
    numbers = made.numbers
    factors = numbers["factors"]

    assert factors.sum(0).tolist() == pytest.approx([1, 1], abs=1e-6)
    assert (factors >= 0).all()
    assert factors[1].tolist() == [0, 0]
    assert numbers["special"].tolist() == [0, 1, 7, 8, 9, 10, 30]
    assert numbers["skipped"] >= QUICK.skip
    text, vision = numbers["thresholds"]
    assert (numbers["tried"][:, :3] == torch.tensor([text, vision, numbers["skipped"]])).all(1).sum() == 1

    model, gone = BODY.model(), []
    weigh = Run.weigh

    def counted(run: Run, layer: int, index: Tensor, weights: Tensor) -> Tensor:
        new = weigh(run, layer, index, weights)
        valid = run.rows.layout.valid.flatten()
        gone.append(((new == 0)[valid].sum(), valid.sum() * 3))
        return new

    with pytest.MonkeyPatch.context() as patch, foveate.attach(model, QUICK, artifacts=[made]):
        patch.setattr(Run, "weigh", counted)
        for batch in (labelled(), labelled(seed=1)):
            model(**batch)
    skips, total = torch.tensor(gone).sum(0).tolist()
    assert numbers["skipped"] == skips / total


@pytest.mark.parametrize(("instead", "factors"), [("input", "modality"), ("nothing", "modality"), ("nothing", "layer")])
def test_factors_are_what_the_answers_lose_without_a_layers_experts(instead: Any, factors: Any) -> None:
    """Against the plain model, whose MoE blocks are overwritten by hooks."""
    model, batch = BODY.model(), labelled()
    method = replace(QUICK, instead=instead, factors=factors)
    found = method.calibrate(Calibration(model, [batch]))["factors"]
    ids, plain = batch["input_ids"], {name: value for name, value in batch.items() if name != "labels"}
    special, shown = torch.isin(ids, torch.tensor([0, 1, 7, 8, 9, 10])), ids == 7
    kinds = [~special & (batch["attention_mask"] == 1), shown]
    kinds = kinds if factors == "modality" else [kinds[0] | kinds[1]]

    def answers() -> Tensor:
        with torch.no_grad():
            return model(**plain).logits[:, -3:-1].flatten(0, 1)

    original, moved = answers(), torch.zeros(5, len(kinds), dtype=torch.double)
    for layer in SPARSE:
        for number, rows in enumerate(kinds):

            def hook(module: Any, args: Any, output: Tensor, rows: Tensor = rows) -> Tensor:
                return torch.where(rows[..., None], args[0] if instead == "input" else torch.zeros_like(output), output)

            handle = anatomy(model).layers[layer].mlp.register_forward_hook(hook)
            moved[layer, number] = divergence(answers(), original).mean()
            handle.remove()
    expected = (moved / moved.sum(0)).expand(5, 2)
    torch.testing.assert_close(found.double(), expected, rtol=1e-3, atol=1e-5)


def test_samples_without_answers_are_judged_by_their_last_row() -> None:
    model, inputs = BODY.model(), BODY.inputs(RAGGED)
    with torch.no_grad():
        expected = model(**inputs).logits[:, -1]

    (found,) = Calibration(model, [inputs]).answers(Recipe())
    torch.testing.assert_close(found, expected)


def test_answers_are_predicted_as_by_the_whole_model_and_have_no_say() -> None:
    model, batch = BODY.model(), labelled()
    recipe = Recipe.of("fastv(layer=2, keep=6)")
    with torch.no_grad(), foveate.attach(model, recipe):
        expected = model(**batch).logits[:, -3:-1].flatten(0, 1)

    (found,) = Calibration(model, [batch]).answers(recipe)
    torch.testing.assert_close(found, expected)


def test_progress_is_told_and_never_exceeded() -> None:
    steps = Steps()
    QUICK.calibrate(Calibration(BODY.model(), [labelled()], watcher=steps))

    assert [what for what, _ in steps.begun] == ["reading", "skipping one layer at a time", "searching for thresholds"]
    assert steps.begun[1][1] == 1 + 2 * len(SPARSE)
    assert steps.done <= sum(count for _, count in steps.begun[1:])


def test_what_cannot_be_reached_or_hosted_is_refused_in_a_line() -> None:
    call = Calibration(BODY.model(), [labelled(ONE)])
    with pytest.raises(FoveateError, match=r"^modes: skip=0.9: the largest .* skip 0\.\d+; give that or less"):
        MoDES(skip=0.9, points=2, reach_text=0.1, reach_vision=0.1).calibrate(call)
    dense = BODIES["qwen3_vl"].model()
    with pytest.raises(FoveateError, match=r"^modes: qwen3_vl has no experts; load a mixture-of-experts model"):
        calibrate("modes", dense, [])
    with pytest.raises(FoveateError, match=r"^modes: qwen3_vl has no experts"):
        foveate.attach(dense, "modes(tau_text=0.1)")
    with pytest.raises(FoveateError, match=r"^modes: needs factors of this model's layers; run `foveate calibrate modes`"):
        foveate.attach(BODY.model(), "modes")
    with pytest.raises(FoveateError, match=r"^artifact of modes: made with skip=0.6; use that, or calibrate it again"):
        attach(BODY.model(), MoDES(skip=0.8))


def test_steps_given_as_embeddings_are_refused() -> None:
    model, inputs = BODY.model(), BODY.inputs(ONE)
    with attach(model, MoDES()):
        cache = model(**inputs).past_key_values
        with pytest.raises(FoveateError, match=r"^inputs_embeds: this recipe needs input_ids in steps of decoding, too"):
            model(inputs_embeds=torch.zeros(1, 1, 48), past_key_values=cache)
