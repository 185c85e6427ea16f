"""ZOO-Prune: the card's worked examples and invariants."""

from __future__ import annotations

from typing import ClassVar

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.items import ItemBatch
from foveate.core.signal import Features, Function
from foveate.engine.functions import function
from foveate.engine.thin import thin
from foveate.methods import ZOOPrune
from foveate.methods.before_llm import zoo_prune
from foveate.methods.before_llm.zoo_prune import relative, sensitivity
from foveate.models import anatomy
from foveate.ops.farthest import farthest_first
from tests.methods.bodiless import images, traits
from tests.suite.bodies import BODIES, ONE, Body

TOKENS = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]])


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mlp(x: Tensor, scale: float = 1.0) -> Tensor:
    return scale * torch.nn.functional.gelu(x @ drawn(6, 8)) @ drawn(8, 5, seed=1)


def test_the_worked_example_of_sensitivity() -> None:
    x = torch.tensor([[[1.0, 1.0], [-1.0, -1.0], [1.0, -1.0]]])

    assert_close(sensitivity(x, torch.relu, torch.eye(2), 0.01), torch.tensor([[1.0, 0.0, 0.5]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("sensitivities", "order"), [([5.0, 4, 3, 1], [0, 2, 1]), ([2.0, 2, 2, 2], [0, 3, 2])])
def test_the_worked_example_of_selection(sensitivities: list[float], order: list[int]) -> None:
    weight = relative(torch.tensor([sensitivities]))

    assert farthest_first(TOKENS, 3, first=weight.argmax(1), weight=weight).tolist() == [order]
    assert relative(torch.tensor([[5.0, 4, 3, 1]]))[0].tolist() == pytest.approx([1, 0.75, 0.5, 0])


def test_all_tokens_of_a_linear_projector_are_alike() -> None:
    found = sensitivity(drawn(1, 30, 6), lambda x: x @ drawn(6, 8), drawn(16, 6, seed=2), 0.01)

    assert relative(found).tolist() == [[1.0] * 30]


def test_a_constant_and_a_turn_change_nothing_and_a_scale_all_alike() -> None:
    x, directions = drawn(1, 20, 6), drawn(16, 6, seed=2)
    turn = torch.linalg.qr(drawn(5, 5, seed=3)).Q
    found = sensitivity(x, mlp, directions, 0.01)

    assert_close(sensitivity(x, lambda x: mlp(x) @ turn + 3, directions, 0.01), found, rtol=1e-3, atol=1e-5)
    assert_close(relative(sensitivity(x, lambda x: mlp(x, 7), directions, 0.01)), relative(found), rtol=1e-3, atol=1e-3)
    assert_close(sensitivity(x, mlp, 9 * directions, 0.01), found)


def test_it_is_the_derivative_and_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    x, directions = drawn(2, 7, 6), torch.nn.functional.normalize(drawn(5, 6, seed=2), dim=-1)
    exact = torch.stack([torch.func.jvp(mlp, (x,), (one.expand_as(x),))[1].norm(dim=-1) for one in directions]).mean(0)
    whole = sensitivity(x, mlp, directions, 0.01)
    monkeypatch.setattr(zoo_prune, "AT_ONCE", 30)

    assert_close(whole, exact, rtol=1e-3, atol=1e-4)
    assert_close(sensitivity(x, mlp, directions, 0.01), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("body", [body for name, body in BODIES.items() if name != "gemma3"], ids=lambda body: body.name)
def test_a_projector_of_low_rank_is_the_projector_where_the_rank_is_full(body: Body) -> None:
    parts = anatomy(body.model())
    assert parts.encoder is not None
    weights = [module.weight for module in parts.encoder.projector.modules() if isinstance(module, torch.nn.Linear)]
    full = max(min(weight.shape) for weight in weights)
    whole, nearly, low = (function(parts, Function("projector", rank=rank)) for rank in (None, full, 1))
    Watching.shown.clear()
    model = body.model()
    with torch.no_grad(), foveate.attach(model, Watching(keep=6, directions=2, rank=2)):
        model(**body.inputs(ONE))
    cells = Watching.shown[0].seen[Features(cells=True)]

    assert torch.equal(nearly(cells), whole(cells))
    assert not torch.allclose(low(cells), whole(cells))


def test_linear_layers_are_the_nearest_of_their_rank() -> None:
    exact = anatomy(BODIES["llava-clip"].model().bfloat16()).encoder
    assert exact is not None
    before = {name: weight.clone() for name, weight in exact.projector.state_dict().items()}
    small = thin(exact, 3).projector
    first, weight = small.get_submodule("linear_1"), exact.projector.get_submodule("linear_1").weight.float()
    best = torch.linalg.svdvals(weight)[3:].norm()

    assert isinstance(first, torch.nn.Sequential)
    assert [tuple(part.weight.shape) for part in first] == [(3, weight.shape[1]), (weight.shape[0], 3)]
    assert best <= (first[1].weight @ first[0].weight - weight).norm() < 1.01 * best
    assert {parameter.dtype for parameter in small.parameters()} == {torch.float32}
    assert all(torch.equal(weight, before[name]) for name, weight in exact.projector.state_dict().items())


def test_a_projector_without_plain_weights_has_no_low_rank() -> None:
    model = BODIES["llava-clip"].model()
    projector = model.model.multi_modal_projector
    projector.linear_1 = projector.linear_1.to("meta")

    with pytest.raises(foveate.FoveateError, match="zoo_prune: rank: the projector has no plain linear layers"):
        foveate.attach(model, "zoo_prune(rank=2)")


def test_the_seed_decides_the_directions_and_nothing_else() -> None:
    features, x = drawn(1, 60, 6), drawn(1, 60, 5, seed=4)

    def chosen(seed: int) -> list[list[int]]:
        torch.manual_seed(seed + 1)
        seen = {Features(cells=True): features, Function("projector"): mlp}
        return ZOOPrune(directions=8).select(images(6, 10, seen=seen, x=x, seed=seed), 20).tolist()

    assert chosen(0) == chosen(0)
    assert len(set(chosen(0)[0]) & set(chosen(1)[0])) > 5


def test_what_cannot_be_pushed_is_refused() -> None:
    assert "pools whole pictures" in str(ZOOPrune().check(traits()))
    assert ZOOPrune().check(traits(projects=True)) is None
    assert ZOOPrune().budget().of(576) == 128


class Watching(ZOOPrune):
    """Remembers what it was shown."""

    shown: ClassVar[list[ItemBatch]] = []

    def select(self, images: ItemBatch, k: int) -> Tensor:
        self.shown.append(images)
        return super().select(images, k)


@pytest.mark.parametrize("body", [body for name, body in BODIES.items() if name != "gemma3"], ids=lambda body: body.name)
def test_a_token_is_what_the_projector_makes_of_its_own_rows(body: Body) -> None:
    model = body.model()
    Watching.shown.clear()
    with torch.no_grad(), foveate.attach(model, Watching(keep=6, directions=2)):
        model(**body.inputs(ONE))

    assert Watching.shown
    for batch in Watching.shown:
        made = batch.seen[Function("projector")](batch.seen[Features(cells=True)])
        assert_close(made, batch.x, rtol=1e-4, atol=1e-5)


def test_a_projector_in_half_precision_is_asked_in_float32() -> None:
    exact, half = (anatomy(BODIES["llava-clip"].model().to(dtype)) for dtype in (torch.float32, torch.bfloat16))
    assert exact.encoder is not None
    assert half.encoder is not None
    exact.encoder.projector.load_state_dict(half.encoder.projector.state_dict())
    cells = drawn(1, 4, exact.encoder.width)

    assert_close(half.encoder.project(cells), exact.encoder.project(cells))
    assert half.encoder.project(cells.bfloat16()).dtype == torch.bfloat16
    assert exact.encoder.project(cells.bfloat16()).dtype == torch.float32
