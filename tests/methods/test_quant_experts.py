"""Quant Experts: the card's worked examples, what each low rank promises, and what the router bounds."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.weights import Replaced, Side
from foveate.engine.linears import dense, values
from foveate.engine.quantize import quantize
from foveate.engine.sides import added
from foveate.engine.trial import Trial
from foveate.methods import QuantExperts
from foveate.methods.weights.quant_experts import divisors, losses, marks, parted, routed, router
from foveate.ops.grid import Grid
from foveate.ops.solve import whitened
from foveate.ops.spectral import kmeans, npmi, spectral
from tests.blocks import NAMES, drawn, trial
from tests.suite.bodies import BODIES, ONE, RAGGED
from tests.suite.conversation import generate, logits

SMALL = {"important": 4, "experts": 3, "shared_rank": 4, "routed_rank": 3, "activations": 16}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def block(seed: int = 0) -> Trial:
    return trial(drawn(seed))


def made(**settings: Any) -> Trial:
    there = block()
    QuantExperts(**(SMALL | settings)).quantize(there)
    return there


def off(there: Trial, name: str, replaced: Replaced | None = None) -> float:
    """Mean square of what is missing in a linear's outputs, on what it is fed in the unquantized model."""
    (rows,), weight = there.exact(name), there.weight(name)
    stand = dense(replaced or there.placed[name], there.linears[name])
    return float((stand(rows.x) - functional.linear(rows.x, weight)).square().mean())


def plain(there: Trial, name: str) -> Replaced:
    weight = there.weight(name)
    grid = Grid.of(weight, 4)
    return Replaced(grid, grid.integers(weight))


def test_the_cards_frequencies() -> None:
    x = torch.tensor([[5.0, 1, 0, 0], [4, 0, 3, 0], [6, 0, 0, 2], [7, 0, 0, 1]])
    found = marks(x, torch.ones(4), 2)
    shared, others = parted(found.sum(0), 2, 2)

    assert [row.nonzero()[:, 0].tolist() for row in found] == [[0, 1], [0, 2], [0, 3], [0, 3]]
    assert found.sum(0).tolist() == [4, 1, 1, 2]
    assert found.float().mean(0).sum() == 2
    assert shared.tolist() == [0, 3]
    assert others.tolist() == [1, 2]
    assert parted(torch.tensor([1, 3, 3, 1]), 1, 9)[0].tolist() == [1]  # the first of equals


def test_the_cards_information() -> None:
    def of(one: float, other: float, both: float) -> float:
        return float(npmi(torch.tensor([[one, both], [both, other]], dtype=torch.double))[0, 1])

    assert of(0.5, 0.5, 0.5) == pytest.approx(1)
    assert of(0.5, 0.5, 0.25) == pytest.approx(0, abs=1e-12)
    assert of(0.5, 0.5, 0.1) == pytest.approx(-0.397940, abs=1e-6)
    assert of(0.5, 0.4, 0.3) == pytest.approx(0.336773, abs=1e-6)
    assert of(0.5, 0.5, 0.0) == -1
    assert of(1.0, 1.0, 1.0) == 1


def test_the_cards_whitened_product() -> None:
    tokens = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    left, right = whitened(torch.eye(2).double(), tokens.mT @ tokens, 1)

    assert_close(left @ right, torch.diag(torch.tensor([1.0, 0.0])).double(), atol=1e-5, rtol=0)
    assert float(((torch.eye(2) - left @ right) @ tokens.mT).square().sum()) == pytest.approx(1, abs=1e-5)


def test_the_cards_router() -> None:
    residuals = torch.tensor([[[0.1, -0.2, 0.0], [0.3, 0.0, 0.1]], [[0.0, 0.4, 0.0], [0.2, 0.2, -0.2]]])
    # What each product leaves of nothing is its own negative.
    left = [torch.linalg.svd(-each, full_matrices=False) for each in residuals]
    downs, ups = torch.stack([right for _, _, right in left]), torch.stack([(u * s).mT for u, s, _ in left])
    found, x = router(torch.zeros(2, 3), downs, ups), torch.tensor([1.0, -2.0, 3.0])

    assert_close(found, torch.tensor([[0.2, 0.1, 0.05], [0.1, 0.3, 0.1]]))
    assert_close(found @ x.abs(), torch.tensor([0.55, 1.0]))
    assert_close((residuals @ x).abs().mean(1), torch.tensor([0.55, 0.8]))
    assert int((found @ x.abs()).argmin()) == 0


def test_the_router_bounds_what_is_missing_from_above() -> None:
    residual = random(12, 20)
    downs, ups = random(3, 4, 20, seed=1) / 4, random(3, 4, 12, seed=2)
    bound = router(residual, downs, ups)
    x = torch.cat([random(50, 20, seed=3), torch.eye(20)])
    true = torch.stack([((residual - up.mT @ down) @ x.mT).abs().mean(0) for down, up in zip(downs, ups, strict=True)], -1)

    assert bool((x.abs() @ bound.mT >= true * (1 - 1e-5)).all())
    assert_close((x.abs() @ bound.mT)[50:], true[50:])  # one input alone


def test_groups_that_are_seen_together_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    label = torch.randint(3, (400,), generator=generator)
    member = torch.arange(12) % 3
    there = ((label[:, None] == member) & (torch.rand(400, 12, generator=generator) < 0.7)).double()
    found = spectral(npmi(there.mT @ there / 400), 3)
    assert len(set(zip(found.tolist(), member.tolist(), strict=True))) == 3
    assert torch.equal(found, spectral(npmi(there.mT @ there / 400), 3))
    assert spectral(torch.eye(2), 1).tolist() == [0, 0]
    assert sorted(kmeans(torch.tensor([[0.0], [9.0], [0.1], [9.1]]), 2).bincount().tolist()) == [2, 2]
    assert kmeans(torch.zeros(5, 2), 3).unique().numel() == 1


def test_divisors_are_of_shared_inputs_alone_and_never_below_one() -> None:
    scale = divisors(torch.tensor([8.0, 2.0, 1.0, 2.0, 3.0]), torch.tensor([0, 2]))
    assert_close(scale, torch.tensor([(8 / (7 / 3)) ** 0.5, 1.0, 1.0, 1.0, 1.0]))
    assert torch.equal(divisors(torch.ones(2), torch.tensor([0, 1])), torch.ones(2))


def test_errors_within_a_group_weigh_more_in_its_product() -> None:
    residual, size = random(16, 20), torch.ones(20)
    inside = torch.arange(20) < 4
    left, right = routed(residual, size, inside, 4)
    missing = residual - left @ right
    assert missing[:, inside].norm() < 1e-2 * missing[:, ~inside].norm()


def test_shared_and_routed_inputs_are_disjoint_however_few_there_are() -> None:
    for count in (3, 8, 200):
        shared, others = parted(torch.randint(9, (40,), generator=torch.Generator().manual_seed(0)), 8, count)
        assert not set(shared.tolist()) & set(others.tolist())
        assert len(others) == min(count, 32)


@pytest.mark.parametrize("weighting", ["channels", "tokens"])
def test_each_part_brings_outputs_nearer(weighting: Any) -> None:
    for name in NAMES.values():
        there = block()
        rtn = off(there, name, plain(there, name))
        shared = [off(made(exclude=False, shared_rank=rank, routed_rank=0), name) for rank in (0, 1, 4, 12)]
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(shared))
        both = made(exclude=False, weighting=weighting)
        assert off(both, name) < shared[2]
        assert shared[2] < rtn
        oracle = _oracle(both, name)
        assert oracle <= off(both, name) * (1 + 1e-6)


def _oracle(there: Trial, name: str) -> float:
    """With the product for each token that is best for it."""
    (rows,), weight, replaced = there.exact(name), there.weight(name), there.placed[name]
    x = rows.x / replaced.divide
    base = functional.linear(x, values(replaced, torch.float32)) + added(replaced.sides[0], x)
    each = [
        base + added(Side(d[None], u[None]), x) for d, u in zip(replaced.sides[1].down, replaced.sides[1].up, strict=True)
    ]
    errors = torch.stack([(one - functional.linear(rows.x, weight)).square().mean(-1) for one in each])
    return float(errors.amin(0).mean())


def test_inputs_that_are_left_out_come_back_by_the_shared_product() -> None:
    there = made()
    for name in NAMES.values():
        found = there.placed[name]
        out = (found.integers == 0).all(0)
        assert int(out.sum()) >= 4
        weight = there.weight(name)
        excluded = weight.masked_fill(out, 0)
        grid = Grid.of(excluded, 4)
        exact = weight.where(out, grid.rounded(excluded))
        (rows,) = there.exact(name)
        best = float((functional.linear(rows.x, exact - weight)).square().mean())
        assert off(there, name) <= best * 1.05  # the product may have those inputs whole, of a divided grid


def test_a_full_rank_is_exact_and_leaves_nothing_to_route() -> None:
    there = made(shared_rank=48, important=4)
    for name in NAMES.values():
        assert off(there, name) < 1e-9
        first, second = there.placed[name].sides
        assert (second.up.mT @ second.down).abs().max() < 1e-4 * (first.up.mT @ first.down).abs().max()


def test_nothing_important_and_no_rank_is_plain_rounding() -> None:
    there = made(important=0, shared_rank=0, routed_rank=0, exclude=False)
    for name in NAMES.values():
        assert there.placed[name].sides == ()
        assert torch.equal(there.placed[name].integers, plain(there, name).integers)


def test_one_expert_is_for_all_tokens() -> None:
    there = made(experts=1)
    found = there.placed[NAMES["q"]].sides[1]
    assert found.router is not None
    assert found.down.shape[0] == 1
    x = random(7, 32)
    assert_close(added(found, x), x @ found.down[0].mT @ found.up[0])


def test_refinement_lowers_its_own_loss() -> None:
    method, there = QuantExperts(**SMALL, epochs=30, rate=3e-3), block()  # type: ignore[arg-type]
    residual, x = random(24, 20), random(80, 20, seed=1) * (1 + 5 * (random(80, 20, seed=2) > 1.5))
    downs, ups = random(3, 2, 20, seed=3) / 5, random(3, 2, 24, seed=4) / 2
    start = Side(downs, ups, router(residual, downs, ups))
    end = method.refined(residual, start, lambda: iter([x[:40], x[40:]]))
    with torch.no_grad():
        before, after = (sum(map(float, losses(x, residual, side))) for side in (start, end))
    assert after < 0.97 * before
    method.quantize(there)
    assert off(there, NAMES["q"]) < off(there, NAMES["q"], plain(there, NAMES["q"]))


def test_tokens_do_not_depend_on_those_beside_them() -> None:
    there = made(activations=8)
    name = NAMES["gate"]
    stand, x = dense(there.placed[name], there.linears[name]), random(2, 9, 32)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    assert_close(stand(x)[:, order], stand(x[:, order]))
    assert_close(stand(x)[1], stand(x[1:])[0])


def test_it_runs_in_the_model_wherever_its_linears_are_called() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    recipe = "quant_experts(important=8, experts=4, shared_rank=8, routed_rank=4)"
    artifact = quantize(model, recipe, [body.inputs(RAGGED), body.inputs(ONE)])
    again = quantize(model, recipe, [body.inputs(RAGGED), body.inputs(ONE)])
    assert all(
        torch.equal(again.numbers[key], value) for key, value in artifact.numbers.items() if isinstance(value, Tensor)
    )
    plain_logits = logits(generate(model, inputs, 4))
    with foveate.attach(model, f"{recipe} + hiprune(keep=6) + snapkv(keep=0.5, window=4)", artifacts=[artifact]):
        generate(model, inputs, 4)
        part = model.model.language_model(inputs_embeds=torch.randn(1, 3, 48)).last_hidden_state
        assert part.isfinite().all()
    assert torch.equal(logits(generate(model, inputs, 4)), plain_logits)


def test_what_would_be_lost_is_refused() -> None:
    with pytest.raises(
        FoveateError, match="shared_rank=16: must be important=32 or more, or what is left out would be lost"
    ):
        QuantExperts(shared_rank=16)
    QuantExperts(shared_rank=16, exclude=False)
    with pytest.raises(FoveateError, match="experts=0"):
        QuantExperts(experts=0)


def test_narrow_linears() -> None:
    """Fewer inputs than are important, or than groups are made of."""
    for inputs in (1, 3, 6):
        layer = nn.Linear(inputs, 5, bias=False).requires_grad_(False)

        class One:
            """A block of one linear."""

            number, groups, dtype = 0, (("one",),), torch.float32
            placed: dict[str, Replaced] = {}  # noqa: RUF012

            def weight(self, name: str) -> Tensor:
                return layer.weight  # noqa: B023

            def exact(self, name: str) -> Any:
                from foveate.core.weights import Rows

                yield Rows(random(9, inputs), torch.ones(9), torch.zeros(9))  # noqa: B023

            def place(self, name: str, replaced: Replaced) -> None:
                self.placed[name] = replaced

        there: Any = One()
        QuantExperts(**SMALL).quantize(there)  # type: ignore[arg-type]
        x = random(4, inputs)
        assert_close(dense(there.placed["one"], layer)(x), x @ layer.weight.mT, atol=0.15, rtol=0.1)
