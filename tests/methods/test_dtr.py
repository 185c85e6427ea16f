"""DTR: the card's worked examples, what the steps do to a model's own states, what goes, and the calibrated direction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate import attach
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.signal import Function, Numbers, Seen, Site
from foveate.core.state import State
from foveate.engine.calibrate import calibrate
from foveate.methods import DTR
from foveate.methods.before_llm.dtr import projection, reversal_loss, reweighed, scaled
from foveate.models import anatomy
from tests.methods.bodiless import LLAVA_7B, layout, traits
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.conversation import generate
from tests.suite.pairs import lent

ALONG = torch.tensor([1.0, 0.0])
TWO = torch.tensor([[True, True]])
LLAVA = BODIES["llava-clip"]


def toy(weights: Tensor, sign: float = 1.0) -> Tensor:
    """``f(a) = a_1 e_1 + a_2 e_2``."""
    return weights * torch.tensor([sign, 1.0])


def loss(*weights: float, lam: float = 0.1) -> float:
    return reversal_loss(toy(torch.tensor([weights])), toy(torch.ones(1, 2)), ALONG, lam).item()


def test_the_worked_losses() -> None:
    assert [loss(*at) for at in ((1, 1), (0.5, 1), (0, 1), (0, 0))] == pytest.approx([1.0, 0.55, 0.1, 0.141421], abs=1e-5)
    assert loss(0.5, 0.3, lam=0.0) == pytest.approx(0.5)


def test_the_length_of_the_direction_does_not_matter() -> None:
    states = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))

    assert_close(projection(states, 7 * states[0]), projection(states, states[0]))
    assert_close(projection(states[0], states[0]), states[0].norm())


def test_the_aligned_token_goes_and_the_orthogonal_one_stays() -> None:
    found = reweighed(toy, TWO, ALONG, steps=12, rate=0.3)

    assert_close(found, torch.tensor([[0.0, 1.0]]))
    shift = projection(toy(torch.ones(1, 2)), ALONG) - projection(toy(found), ALONG)
    assert shift.item() == pytest.approx(1.0)


def test_a_picture_that_leads_to_refusal_already_keeps_its_weights() -> None:
    assert_close(reweighed(lambda weights: toy(weights, -1.0), TWO, ALONG, steps=12, rate=0.3), torch.ones(1, 2))


def test_four_published_steps_leave_the_card_s_weight() -> None:
    found = reweighed(lambda weights: weights[:, :1] * ALONG, TWO, ALONG)

    assert found[0, 0].item() == pytest.approx(0.9597, abs=5e-4)


@pytest.mark.parametrize("lam", [0.0, 0.1, 10.0])
def test_how_much_staying_counts(lam: float) -> None:
    found = reweighed(toy, TWO, ALONG, steps=200, rate=0.01, lam=lam)

    assert_close(found, torch.tensor([[1.0 if lam > 1 else 0.0, 1.0]]), atol=0.03, rtol=0)


def test_no_step_and_other_rows_leave_weights_at_one() -> None:
    assert torch.equal(reweighed(toy, TWO, ALONG, steps=0), torch.ones(1, 2))
    tokens = torch.tensor([[False, True]])
    assert torch.equal(reweighed(toy, tokens, ALONG, rate=0.5)[:, :1], torch.ones(1, 1))


def test_weight_decay_pulls_all_weights_down() -> None:
    still = reweighed(lambda weights: 0 * weights, TWO, ALONG, steps=4, rate=0.01, decay=0.5)

    assert_close(still, torch.full((1, 2), (1 - 0.01 * 0.5) ** 4))


def test_samples_do_not_feel_each_other() -> None:
    mixing = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def states(of: slice) -> Callable[[Tensor], Tensor]:
        return lambda weights: torch.einsum("bn,bnd->bd", weights, mixing[of]).tanh()

    along, tokens = ALONG.double(), torch.ones(3, 4, dtype=torch.bool)
    together = reweighed(states(slice(3)), tokens, along, rate=0.2)

    for sample in range(3):
        alone = reweighed(states(slice(sample, sample + 1)), tokens[:1], along, rate=0.2)
        assert_close(alone[0], together[sample])


def test_a_gradient_that_overflows_moves_nothing() -> None:
    found = reweighed(lambda weights: torch.stack([(weights[:, 0] - 1).sqrt(), weights[:, 1]], dim=1), TWO, torch.ones(2))

    assert found[0, 0] == 1
    assert found[0, 1] < 1


def test_without_gradients_the_model_is_blamed() -> None:
    with pytest.raises(FoveateError, match="model: no gradient comes through its decoder layers"):
        reweighed(lambda weights: weights.detach(), TWO, ALONG)


def edited(method: DTR, slope: Tensor, prompts: tuple[str, ...], x: Tensor | None = None) -> Any:
    """What a method makes of prompts whose last state is a sum of rows, each times its ``slope`` ``[N]``."""
    shown = layout(*prompts)
    x = torch.ones(*shown.shape, 2) if x is None else x
    seen: Seen = {
        Function("through", 1): lambda rows: (rows * slope[:, None]).cumsum(1),
        Numbers("dtr"): {"direction": torch.tensor([[0.0, 0.0], [1.0, 0.0]])},
    }
    edit = replace(method, layer=1).edit(Site("sequence"), x, shown, seen, State())
    return shown, edit, None if edit is None else shown.after(edit)


SLOPE = torch.tensor([0.0, 0.0, 2.0, -1.0, -1.0, -1.0, 1.0, 0.0])


def test_the_lowest_share_goes_and_order_stays() -> None:
    _, edit, after = edited(DTR(keep=0.6, lam=0.0), SLOPE, ("tt11111t",))

    assert after.origin.tolist() == [[0, 1, 3, 4, 5, 7]]
    assert after.visual == (3,)
    assert_close(edit.values, torch.ones(1, 6, 2))


def test_what_stays_is_scaled_in_its_own_dtype() -> None:
    x = torch.full((1, 8, 2), 3.0, dtype=torch.bfloat16)
    _, edit, _ = edited(DTR(keep=1.0, rate=0.25, steps=2, lam=0.0), SLOPE, ("tt11111t",), x)

    assert edit.values.dtype == torch.bfloat16
    assert_close(edit.values[0, :, 0].float(), torch.tensor([3.0, 3.0, 1.5, 3.0, 3.0, 3.0, 1.5, 3.0]))
    assert torch.equal(scaled(x, torch.ones(1, 8)), x)


def test_budgets_are_of_a_prompt_whose_pictures_are_one_pool() -> None:
    _, _, after = edited(DTR(keep=0.5, lam=0.0, rate=0.1), SLOPE, ("t111122t", "..t11t2t"))

    assert after.visual == (3, 2)


@pytest.mark.parametrize(("beta", "gone"), [(0.99, [2, 6]), (0.5, [])])
def test_a_threshold_instead_of_a_share(beta: float, gone: list[int]) -> None:
    _, _, after = edited(DTR(beta=beta, lam=0.0), SLOPE, ("tt11111t",))

    assert after.origin.tolist() == [[row for row in range(8) if row not in gone]]
    assert after.visual == (5 - len(gone),)


def test_without_steps_whole_prompts_are_left_alone() -> None:
    assert edited(DTR(keep=1.0, steps=0), SLOPE, ("tt11111t",))[1] is None


def test_without_steps_all_weights_are_equal_and_the_first_tokens_stay() -> None:
    _, edit, after = edited(DTR(keep=0.6, steps=0), SLOPE, ("tt11111t",))

    assert after.origin.tolist() == [[0, 1, 2, 3, 4, 7]]
    assert torch.equal(edit.values, torch.ones(1, 6, 2))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_s_loss_falls(mode: Callable[[], Any]) -> None:
    """The state of the last token at the layer, with the weights that were found and without."""
    model, inputs, seen = LLAVA.model(), LLAVA.inputs(RAGGED), []
    (direction,) = [a.numbers["direction"] for a in lent(LLAVA, model) if a.method == "dtr"]

    def states(**given: Any) -> Tensor:
        method = DTR(keep=1.0, layer=2, **given)
        with attach(model, method, artifacts=lent(LLAVA, model)), mode():
            module = model.model.language_model.layers[2]
            handle = module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
            model(**inputs)
            handle.remove()
        return seen[-1][:, -1]  # padded on the left; of earlier calls the last is the prompt's own

    before = states(steps=0)
    found = [reversal_loss(states(rate=rate), before, direction[2], 0.1) for rate in (0.01, 0.05)]

    start = reversal_loss(before, before, direction[2], 0.1)
    assert bool((found[0] < start).all())
    assert bool((found[1] < found[0]).all())


def test_the_cache_is_shorter_by_what_went() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with attach(model, "dtr", artifacts=lent(LLAVA, model)) as session:
        cache = generate(model, inputs, 2).past_key_values

    assert session.report.visual_tokens == (13,) * 4
    assert {layer.keys.shape[2] for layer in cache.layers} == {inputs["input_ids"].shape[1] - 3 + 1}


def test_text_alone_is_left_alone() -> None:
    model, ids = LLAVA.model(), torch.tensor([[1, 20, 30, 40]])
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with attach(model, "dtr", artifacts=lent(LLAVA, model)) as session:
            assert torch.equal(model(input_ids=ids).logits, plain)
    assert session.report.idle == ()


def text(*rows: tuple[int, ...]) -> dict[str, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_the_direction_is_the_difference_of_means_at_every_layer() -> None:
    model = LLAVA.model()
    prompts, kinds = [(1, 20, 30), (1, 40), (1, 50, 21, 22), (1, 23)], ["harmful", "harmless", "harmful", "harmless"]
    with torch.no_grad():
        last = [torch.stack(model(**text(each), output_hidden_states=True).hidden_states)[:-1, 0, -1] for each in prompts]

    def direction(*kinds: str) -> Tensor:
        labels = [list(kinds[:3]), list(kinds[3:])]
        artifact = calibrate("dtr", model, [text(*prompts[:3]), text(*prompts[3:])], labels=labels)
        return artifact.numbers["direction"]  # type: ignore[no-any-return]

    found = direction(*kinds)
    assert_close(found, (last[1] + last[3]) / 2 - (last[0] + last[2]) / 2)
    swapped = direction(*({"harmful": "harmless", "harmless": "harmful"}[kind] for kind in kinds))
    assert_close(swapped, -found)
    two = calibrate("dtr", model, [text(prompts[0], prompts[1])], labels=[["harmful", "harmless"]])
    assert_close(two.numbers["direction"], last[1] - last[0])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([["harmful", "bad"]], "dtr: .* is 'bad'; must be 'harmful' or 'harmless'"),
        ([["harmful", "harmful"]], "dtr: no sample has the label .* 'harmless'"),
        ([["harmful"], ["harmless"]], "labels: must be a list for each of the 1 batches, and there are 2"),
        ([], "dtr: no sample has the label .* 'harmful'"),
    ],
)
def test_samples_whose_kind_is_not_known_are_refused(labels: list[list[str]], message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        calibrate("dtr", LLAVA.model(), [text((1, 20), (1, 30))], labels=labels)


def test_the_published_layer_in_proportion() -> None:
    assert DTR().fitted(traits()).layer == 14
    assert DTR().fitted(traits(replace(LLAVA_7B, layers=40))).layer == 18
    assert DTR(layer=3).fitted(traits()).layer == 3


def test_what_cannot_run_is_refused() -> None:
    there = traits(artifacts={"dtr": Artifact("dtr", LLAVA_7B, {"direction": torch.zeros(32, 4096)})})

    assert DTR().check(there) is None
    assert DTR(layer=32).check(there) == "layer=32: must be in 1..31"
    assert "run `foveate calibrate dtr`" in (DTR().check(traits()) or "")
    assert DTR(steps=0).check(traits()) is None
    assert "decoder layer 2 has a recurrent state" in (DTR().check(traits(recurrent=(2, 20))) or "")
    assert DTR(layer=2).check(replace(there, recurrent=(2, 20))) is None
    assert anatomy(LLAVA.model()).traits().recurrent == ()
