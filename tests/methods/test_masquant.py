"""MASQuant: the card's worked example, both paths, the best low rank, and what learning scales is worth."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.roles import Role
from foveate.core.weights import Replaced, Rows
from foveate.engine.linears import dense, values
from foveate.engine.quantize import quantize
from foveate.engine.sides import Present, saying
from foveate.engine.trial import Trial
from foveate.methods import MASQuant, SmoothQuant
from foveate.methods.weights.masquant import Scales, learning, mended, modality, rank_of
from foveate.ops.grid import Grid, passing, tokens
from foveate.ops.solve import Moments, whitened
from tests.blocks import GROUPS, NAMES, drawn, trial
from tests.suite.bodies import BODIES, ONE, RAGGED

T, V, A = Role.TEXT, Role.IMAGE, Role.AUDIO
PLAIN = MASQuant(bits=4, activations=16, vision=0.2)


class Steep:
    """Gradients of two blocks: at visual rows half and a fifth those of answers."""

    def of(self, name: str) -> list[list[Rows]]:
        role, sample = torch.tensor([V, Role.ANSWER]), torch.zeros(2, dtype=torch.long)
        return [[Rows(torch.tensor([[size], [1.0]]), role, sample)] for size in (0.5, 0.2)]


def block(seed: int = 0, outlier: float = 1.0) -> Trial:
    """In which an input of the first linears is ``outlier`` times larger at visual rows."""
    case = drawn(seed)
    seen = case["vis_mask"][..., None]
    for name in ("x", "x_q"):
        case[name][..., 3:4] = torch.where(seen, outlier * case[name][..., 3:4], case[name][..., 3:4])
    found = trial(case)
    found._slopes = cast(Any, Steep())
    return found


def moments(x: Tensor) -> Tensor:
    found = Moments(x.shape[-1])
    found.add(x)
    return found.own


def linear(weight: Tensor) -> nn.Linear:
    found = nn.Linear(weight.shape[1], weight.shape[0], bias=False).requires_grad_(False)
    found.weight.copy_(weight)
    return found


def run(replaced: Replaced, weight: Tensor, x: Tensor, role: Any) -> Tensor:
    with saying(Present(torch.full(x.shape[:-1], int(role)))):
        return dense(replaced, linear(weight))(x)


def test_the_cards_example() -> None:
    weight, x = torch.tensor([[2.0, -1.0], [1.0, 2.0]]), torch.tensor([[8.0, 2.0], [1.0, -3.0], [0.5, 4.0]])
    scales = {"text": torch.tensor([0.5, 1.0]), "vision": torch.tensor([2.0, 1.0])}
    found = MASQuant(activations=16, rank=1).replaced(weight, scales, {"vision": moments(x)})

    assert_close(values(found, torch.float32), torch.tensor([[1.0, -1.0], [4 / 7, 2.0]]))
    base = functional.linear(x[:1] / scales["vision"], values(found, torch.float32))
    assert_close(base, torch.tensor([[2.0, 6.285714]]))
    assert_close(run(found, weight, x[:1], V), torch.tensor([[14.0, 12.0]]), rtol=1e-5, atol=1e-4)
    assert_close(mended(torch.tensor([[3.0, 0.0], [10 / 7, 0.0]]).double(), moments(x), 1).down.shape, (1, 1, 2))


def test_scales_of_any_size_leave_the_product_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(12, 16, generator=generator), torch.randn(3, 10, 16, generator=generator)
    role = torch.tensor([[T, V, A, V, T] * 2] * 3)
    scales = {kind: torch.rand(16, generator=generator) * 3 + 0.1 for kind in ("text", "vision", "audio")}

    class Fine(Grid):
        """So many steps that none is seen."""

        def passing(self, weight: Tensor) -> Tensor:
            return weight

    stand = learning(weight, scales, role, lambda weight: Fine(8, weight.new_ones(len(weight), 1)))
    assert_close(stand(x), x @ weight.mT, rtol=2e-4, atol=2e-4)


def test_text_is_smoothquant_and_nothing_of_pictures_is_in_it() -> None:
    there = block()
    MASQuant(epochs=0, alpha=0.5).quantize(there)
    for name in GROUPS["attn"]:
        found, weight = there.placed[name], there.weight(name)
        assert found.divide is not None
        scaled = weight * found.divide
        assert torch.equal(values(found, torch.float32), Grid.of(scaled, 4).rounded(scaled))
        x = torch.randn(2, 5, weight.shape[1])
        plain = functional.linear(tokens(x / found.divide, 8), values(found, torch.float32))
        assert torch.equal(run(found, weight, x, T), plain)
        assert not torch.allclose(run(found, weight, x, V), plain)
    most = next(iter(there.exact(GROUPS["attn"][0])))
    text = modality(most.role)["text"]
    own = (most.x[text].abs().amax(0) / there.weight(NAMES["q"]).abs().amax(0)).sqrt()
    for name in GROUPS["attn"]:
        assert_close(there.placed[name].divide, own)


def test_the_last_linear_has_neither_scale_nor_rank_and_gate_starts_as_up_does() -> None:
    there = block()
    MASQuant(epochs=0).quantize(there)
    assert there.placed[NAMES["down"]].divide is None
    assert there.placed[NAMES["down"]].by_role == ()
    assert there.placed[NAMES["down"]].activations == 8
    assert torch.equal(there.placed[NAMES["gate"]].divide, there.placed[NAMES["up"]].divide)  # type: ignore[arg-type]
    assert len(there.placed[NAMES["o"]].by_role) == 1


def test_a_full_rank_gives_pictures_their_exact_product() -> None:
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(20, 16, generator=generator), torch.randn(1, 60, 16, generator=generator)
    scales = {"text": torch.rand(16) + 0.5, "vision": torch.rand(16) + 0.5}
    found = MASQuant(bits=2, activations=16, rank=1.0).replaced(weight, scales, {"vision": moments(x[0])})
    assert_close(run(found, weight, x, V), x @ weight.mT, rtol=1e-3, atol=1e-3)
    text = run(found, weight, x, T)
    assert (text - x @ weight.mT).norm() > 0.1 * text.norm()


def test_the_low_rank_is_the_best_of_its_rank_and_errors_fall_with_it() -> None:
    generator = torch.Generator().manual_seed(2)
    missing = torch.randn(24, 20, generator=generator).double()
    x = torch.randn(90, 20, generator=generator).double() * torch.logspace(-1, 1, 20).double()

    def off(product: Tensor) -> float:
        return float((x @ (missing - product).mT).square().sum())

    def product(rank: int, own: Tensor) -> Tensor:
        side = mended(missing, own, rank)
        return side.up[0].mT @ side.down[0]

    errors = [off(product(rank, moments(x))) for rank in range(1, 21)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-6 * errors[0]
    plain = [off(product(rank, torch.eye(20).double())) for rank in range(1, 20)]
    assert all(ours <= theirs for ours, theirs in zip(errors, plain, strict=False))
    best = mended(missing, moments(x), 4)
    for size in (1e-3, 1e-2, 0.1):
        for _ in range(20):
            down, up = (part + size * torch.randn(part.shape, generator=generator) for part in (best.down[0], best.up[0]))
            assert off(up.mT @ down) >= errors[3] * (1 - 1e-9)


def test_fewer_rows_than_inputs_are_enough() -> None:
    generator = torch.Generator().manual_seed(3)
    missing, x = torch.randn(24, 40, generator=generator).double(), torch.randn(6, 40, generator=generator).double()
    left, right = whitened(missing, moments(x), 6)
    assert left.isfinite().all()
    assert_close(x @ (left @ right).mT, x @ missing.mT, rtol=1e-3, atol=1e-3)


def test_inputs_that_are_always_zero_leave_a_plain_low_rank() -> None:
    missing = torch.randn(24, 20, generator=torch.Generator().manual_seed(2)).double()
    side = mended(missing, torch.zeros(20, 20).double(), 20)
    assert_close(side.up[0].mT @ side.down[0], missing, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("rank", "shape", "expected"),
    [(0.2, (400, 300), 60), (0.2, (64, 48), 32), (40, (64, 48), 40), (0.9, (20, 60), 20), (99, (64, 48), 48)],
)
def test_ranks(rank: float, shape: tuple[int, int], expected: int) -> None:
    assert rank_of(rank, shape) == expected


def losses(there: Trial, method: MASQuant, scales: Mapping[str, Scales]) -> float:
    (exact,), (reached,) = there.inspect(()), there.inspect((), "reached")
    stands = {
        name: learning(there.weight(name), scales[name], reached.role, method.grid, method.activations)
        for name in NAMES.values()
    }
    with torch.no_grad():
        off = (reached.run(reached.x, stands) - exact.run(exact.x)).abs().mean(-1)
    return float(
        (
            off * sum(mask * {"text": 1.0, "vision": 0.2, "audio": 0.0}[k] for k, mask in modality(reached.role).items())
        ).mean()
    )


@pytest.mark.parametrize("scales", ["split", "merged"])
def test_learning_brings_the_block_nearer_to_the_unquantized_one(scales: Any) -> None:
    there = block(outlier=12.0)
    method = MASQuant(bits=3, activations=8, epochs=40, rate=2e-2, vision=0.2, scales=scales)
    start = method.initial(there)
    learned = method.learned(there, start)

    assert losses(there, method, learned) < 0.95 * losses(there, method, start)
    assert all(bool((scale.abs() >= 1e-2).all()) for of in learned.values() for scale in of.values())
    q, k = (learned[NAMES[name]]["text"] for name in "qk")
    assert torch.equal(q, k) == (scales == "merged")
    again = method.learned(there, start)
    assert all(torch.equal(again[name][kind], scale) for name, of in learned.items() for kind, scale in of.items())


def test_steps_whose_gradients_overflow_are_left_out_and_said() -> None:
    there, said = block(), list[str]()
    there.say = said.append  # type: ignore[method-assign]
    there._states["reached"][0][0, 0] = float("inf")  # type: ignore[index]
    method = MASQuant(epochs=2, vision=0.2)
    learned = method.learned(there, method.initial(there))
    assert all(bool(scale.isfinite().all()) for of in learned.values() for scale in of.values())
    assert len(said) == 1
    assert "block 0: slopes of 2 steps are not finite in torch.float32" in said[0]


def test_merged_scales_are_split_ones_that_are_equal() -> None:
    made = []
    for scales in ("split", "merged"):
        there = block()
        MASQuant(epochs=0, scales=scales).quantize(there)  # type: ignore[arg-type]
        made.append(there.forward("reached")[0])
    assert torch.equal(*made)


def test_gradients_pass_rounding_and_reach_the_steps() -> None:
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for symmetric, group in ((True, -1), (False, 8)):
        grid = Grid.of(weight, 4, group, symmetric)
        passed = grid.passing(weight)
        assert_close(passed.detach(), Grid.of(weight.detach(), 4, group, symmetric).rounded(weight.detach()))
        (slope,) = torch.autograd.grad(passed.sum(), weight)
        largest = weight.detach().abs().argmax(1)
        others = torch.ones_like(slope, dtype=torch.bool).scatter(1, largest[:, None], False)
        if symmetric:
            assert torch.equal(slope[others], torch.ones_like(slope[others]))
        assert slope.isfinite().all()
    x = torch.randn(3, 5, 16).requires_grad_()
    assert_close(passing(x, 8).detach(), tokens(x.detach(), 8))
    assert passing(x, 16) is x


def test_errors_weigh_by_the_largest_ratio_of_gradients_of_all_blocks_unless_said() -> None:
    assert MASQuant().heed(block(), {"text", "vision"}) == {"text": 1.0, "vision": 0.5}
    assert MASQuant(vision=0.126).heed(block(), {"vision"}) == {"text": 1.0, "vision": 0.126}
    assert MASQuant(audio=0.3, vision=1.0).heed(block(), {"vision", "audio"}) == {"text": 1.0, "vision": 1.0, "audio": 0.3}


def test_where_pictures_alone_are_large_it_beats_one_scale_for_all() -> None:
    """Four bits for both: the outlier of pictures costs the words nothing, and what it costs pictures is mended."""
    off = {}
    for method in (SmoothQuant(bits=4, activations=4), MASQuant(bits=4, activations=4, epochs=0)):
        there = block(outlier=60.0)
        method.quantize(there)
        wanted, made, role = there.forward("exact")[0], there.forward("reached")[0], next(there.inspect(())).role
        error = (made - wanted).square().mean(-1)
        off[method.name] = {kind: float(error[mask].mean()) for kind, mask in modality(role).items() if mask.any()}
    assert off["masquant"]["text"] < 0.85 * off["smoothquant"]["text"]
    assert off["masquant"]["vision"] < off["smoothquant"]["vision"]


def test_samples_without_pictures_are_said() -> None:
    body = BODIES["llava-clip"]
    artifact = quantize(body.model(), "masquant(epochs=0)", [body.inputs([(9, 0, 5)])])
    assert artifact.numbers["said"] == ["masquant: no sample shows a picture, so pictures will be taken for text"]
    assert not any("role" in name for name in artifact.numbers)


@pytest.mark.parametrize(
    "recipe", ["masquant(bits=3, epochs=1)", "masquant(epochs=1, activations=16, group_size=16, symmetric=False)"]
)
def test_a_model_is_learned_from_its_samples_and_a_run_that_was_cut_goes_on_alike(recipe: str, tmp_path: Any) -> None:
    body = BODIES["llava-clip"]
    model, batches = body.model(), [body.inputs(RAGGED), body.inputs(ONE)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    held = quantize(model, recipe, batches)
    quantize(model, recipe, batches, out=tmp_path)
    last = sorted((tmp_path / "masquant").glob("block-*"))[-1]
    whole = last.read_bytes()
    last.unlink()
    quantize(model, recipe, batches, out=tmp_path)
    assert last.read_bytes() == whole
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    divides = [held.numbers[f"0.self_attn.{name}_proj.divide"] for name in "qk"]
    assert not torch.equal(*divides)


def test_parameters_are_checked() -> None:
    with pytest.raises(FoveateError, match="masquant: scales='shared'"):
        MASQuant(scales="shared")  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="masquant: rank=-1"):
        MASQuant(rank=-1)
