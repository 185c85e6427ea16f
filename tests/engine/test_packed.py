"""What stands for linears: kernels where they fit, and what was placed, to the last bit or to what bfloat16 leaves."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import foveate
from foveate.core.weights import Replaced, Sparse
from foveate.engine.linears import read_back, tensors_of, values
from foveate.engine.packed import PackedLinear, _folded, _unfolded
from foveate.engine.quantize import quantize
from foveate.engine.sides import product
from foveate.ops.grid import Grid
from tests.suite.bodies import BODIES, RAGGED


def linear(out: int, inputs: int, dtype: torch.dtype, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, out, bias=bias).to(dtype)


def replaced(of: nn.Linear, bits: int, group: int = -1, symmetric: bool = True, **more: object) -> Replaced:
    weight = of.weight.detach().float()
    grid = Grid.of(weight, bits, group, symmetric, stored=of.weight.dtype)
    return Replaced(grid, grid.integers(weight), **more)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("out", "inputs", "bits", "group", "symmetric", "kernel"),
    [
        (32, 64, 4, 32, True, "int4"),
        (32, 64, 4, 32, False, "int4"),
        (48, 128, 3, -1, True, "int4"),
        (48, 128, 2, 64, False, "int4"),
        (16, 512, 4, -1, False, "int4"),
        (40, 64, 4, 32, True, "rows"),
        (32, 64, 4, 16, True, "rows"),
        (32, 48, 4, -1, True, "rows"),
        (7, 96, 8, -1, True, "int8"),
        (7, 96, 8, -1, False, "rows"),
        (32, 64, 8, 32, True, "rows"),
        (32, 500, 8, -1, True, "rows"),
        (32, 100, 8, -1, True, "rows"),
        (32, 12, 8, -1, True, "rows"),
        (32, 33, 8, -1, True, "rows"),
        (32, 33, 4, -1, False, "rows"),
        (1, 32, 5, -1, True, "int8"),
        (16, 8, 8, -1, True, "rows"),
        (16, 16, 8, -1, True, "rows"),
        (16, 40, 8, -1, True, "rows"),
        (5, 1, 6, -1, True, "rows"),
    ],
)
def test_kernels_take_shapes_that_they_get_right_and_no_others(
    out: int, inputs: int, bits: int, group: int, symmetric: bool, kernel: str
) -> None:
    of = linear(out, inputs, torch.bfloat16)
    there = replaced(of, bits, group, symmetric)
    packed = PackedLinear(of, there)

    assert packed.kernel == kernel
    for shape in ((inputs,), (1, inputs), (3, inputs), (2, 5, inputs)):
        x = torch.randn(*shape).to(torch.bfloat16)
        exact = functional.linear(x.float(), values(there, torch.float32), of.bias.float())
        made = packed(of.forward, x)
        assert made.dtype == torch.bfloat16
        assert made.shape == exact.shape
        # Rounded to bfloat16 twice, before the bias and behind it.
        assert (made.float() - exact).norm() <= 8e-3 * exact.norm()


def test_in_any_other_dtype_it_is_the_plain_product_to_the_last_bit() -> None:
    for dtype in (torch.float32, torch.float64, torch.float16):
        for bits, group, symmetric in ((4, 16, True), (4, 16, False), (3, -1, True), (8, 16, False), (2, -1, False)):
            of = linear(24, 48, dtype)
            there = replaced(of, bits, group, symmetric)
            packed, x = PackedLinear(of, there), torch.randn(2, 7, 48).to(dtype)
            assert packed.kernel == "rows"
            assert torch.equal(packed(of.forward, x), functional.linear(x, values(there, dtype), of.bias))


def test_slabs_are_put_together(monkeypatch: pytest.MonkeyPatch) -> None:
    of, x = linear(50, 48, torch.float32), torch.randn(9, 48)
    added = torch.randint(-7, 8, (50, 48)) * (torch.rand(50, 48) < 0.05)
    added[7:14] = 0
    for sparse in (None, Sparse.of(added, torch.rand(50, 1), 4)):
        there = replaced(of, 4, 16, False, sparse=sparse)
        expected = PackedLinear(of, there)(of.forward, x)
        with monkeypatch.context() as patch:
            patch.setattr("foveate.engine.packed.SLAB", 48 * 7)
            torch.testing.assert_close(PackedLinear(of, there)(of.forward, x), expected)


def test_entries_take_what_they_need_and_come_back() -> None:
    """Two bytes for the input that an entry is of, its own bits, and two bytes a row that say how many there are."""
    of = linear(24, 100, torch.float32)
    added = torch.randint(-7, 8, (24, 100), dtype=torch.int8) * (torch.rand(24, 100) < 0.02)
    added[3] = 5
    added[4] = 0
    sparse = Sparse.of(added, torch.rand(24, 1), 4)
    assert sparse is not None
    there, plain = replaced(of, 3, sparse=sparse), replaced(of, 3)
    written, entries = tensors_of(there, torch.float32), int((added != 0).sum())
    beside = {name: tensor.nbytes for name, tensor in written.items() if name not in tensors_of(plain, torch.float32)}

    assert sum(beside.values()) == 2 * entries + 4 * -(-entries * 4 // 32) + (2 + 4) * 24 + 1
    assert torch.equal(values(read_back(written), torch.float32), values(there, torch.float32))
    torch.testing.assert_close(values(there, torch.float32), values(plain, torch.float32) + added * sparse.scale)
    held = PackedLinear(of, there).nbytes - PackedLinear(of, plain).nbytes
    assert held == 3 * entries + (2 + 4) * 24


def test_entries_that_were_written_with_all_rows_as_wide_as_the_fullest_are_read() -> None:
    of = linear(3, 8, torch.float32)
    written = tensors_of(replaced(of, 3), torch.float32) | {
        "index": torch.tensor([[1, 7], [-1, -1], [0, -1]], dtype=torch.int32),
        "sparse": torch.tensor([[3, -2], [0, 0], [7, 0]], dtype=torch.int8),
        "sparse_scale": torch.tensor([[0.5], [1.0], [2.0]]),
    }
    expected = values(replaced(of, 3), torch.float32)
    expected[0, 1] += 1.5
    expected[0, 7] -= 1.0
    expected[2, 0] += 14.0
    assert torch.equal(values(read_back(written), torch.float32), expected)
    wide = Sparse.of(torch.eye(2, 40_000, dtype=torch.int8), torch.ones(2, 1))
    assert wide is not None
    assert wide.index.dtype == torch.int32


def test_inputs_are_divided_and_rounded_and_entries_added() -> None:
    of = linear(24, 48, torch.float32)
    added = torch.zeros(24, 48, dtype=torch.int8)
    added[0::2, 3] = added[1::2, 0] = added[1::2, 47] = 5
    sparse = Sparse.of(added, torch.full((24, 1), 0.5))
    there = replaced(of, 4, divide=torch.rand(48) + 0.5, activations=4, sparse=sparse)
    packed, x = PackedLinear(of, there), torch.randn(5, 48)

    weight = there.grid.values(there.integers)
    weight[0::2, 3] += 2.5
    weight[1::2, 0] += 2.5
    weight[1::2, 47] += 2.5
    divided = x / there.divide
    scale = divided.abs().amax(-1, keepdim=True) / 7
    fed = product(there, x, lambda fed: fed)
    assert torch.equal(fed.div(scale).round().unique().abs().amax(), torch.tensor(7.0))
    rounded = (divided / scale).round().clamp(-8, 7) * scale
    torch.testing.assert_close(packed(of.forward, x), functional.linear(rounded, weight, of.bias))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_written_takes_its_bits_and_comes_back(bits: int, symmetric: bool) -> None:
    of = linear(24, 44, torch.bfloat16)
    there = replaced(of, bits, 4, symmetric, divide=torch.rand(44), activations=8)
    written = tensors_of(there, torch.bfloat16)
    back = read_back(written)

    assert written["words"].nbytes == 4 * 24 * -(-44 * bits // 32)
    assert written["scale"].dtype == torch.bfloat16
    assert torch.equal(back.integers, there.integers)
    assert torch.equal(values(back, torch.float32), values(there, torch.float32))
    assert back.divide is not None
    assert torch.equal(back.divide, there.divide)
    assert back.activations == 8


def test_rows_and_columns_of_zeros_and_constants_survive() -> None:
    of = linear(6, 32, torch.float32)
    with torch.no_grad():
        of.weight[0] = 0
        of.weight[1] = 0.25
        of.weight[:, 3] = 0
    for bits, symmetric in ((2, True), (4, False), (8, True)):
        there = replaced(of, bits, -1, symmetric)
        made = values(there, torch.float32)
        assert made.isfinite().all()
        assert not made[0].any()
        torch.testing.assert_close(made[1], of.weight[1].detach(), rtol=0.02, atol=1e-6)


def test_memory_is_what_is_packed() -> None:
    of = linear(256, 512, torch.bfloat16)
    assert PackedLinear(of, replaced(of, 4, 128)).nbytes == 256 * 512 // 2 + 4 * 256 * 4
    assert PackedLinear(of, replaced(of, 8)).nbytes == 256 * 512 + 2 * 256
    single = linear(256, 512, torch.float32)
    assert PackedLinear(single, replaced(single, 3)).nbytes == 256 * 512 + 4 * 256


def test_off_the_processor_two_lie_in_a_byte() -> None:
    for inputs, symmetric in ((48, True), (48, False), (33, True)):
        of = linear(24, inputs, torch.float32)
        integers = replaced(of, 4, -1, symmetric).integers
        folded = _folded(integers, inputs, 4)
        assert folded.shape == (24, inputs if inputs % 2 else inputs // 2)
        assert torch.equal(_unfolded(folded, inputs), integers)
    assert _folded(integers, 33, 8) is integers


def test_the_model_keeps_its_modules_and_a_copy_is_plain() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    plain, before = model(**inputs).logits, dict(model.named_modules())
    artifact = quantize(model, "rtn(bits=3)")
    recipe = "rtn(bits=3) + hiprune(keep=6) + snapkv(keep=0.5, window=4)"
    with foveate.attach(model, recipe, artifacts=[artifact]) as session:
        assert not torch.equal(model(**inputs).logits, plain)
        assert dict(model.named_modules()) == before
        assert torch.equal(copy.deepcopy(model)(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)
    report = session.report
    assert report.visual_tokens[-1] == pytest.approx(8)  # 6 of each picture, of which one sample has two
    assert report.weights == sum(
        p.numel() for n, p in model.named_parameters() if "layers" in n and "proj.weight" in n and "vision" not in n
    )
    assert 8 < 8 * report.weight_bytes / report.weights < 9
    assert report.unpacked == 1.0
    assert "no kernel for 100% of the linears" in str(report)
    assert not any("rtn" in line for line in report.idle_lines())
