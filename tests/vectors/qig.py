"""QIG: its code's attributions, its searches on them, and what quantized blocks make of the inputs of later groups."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch.testing import assert_close

from foveate.core.weights import Replaced, Stream
from foveate.engine.trial import Trial
from foveate.methods import QIG
from foveate.methods.weights.awq import mean_size
from foveate.methods.weights.qig import normalised
from foveate.ops.grid import Grid, spans
from foveate.ops.scaling import Found
from tests.blocks import GROUPS, trial
from tests.vectors import Case


def check_attributions(case: Case) -> None:
    for group, names, block in _groups(case):
        theirs = case[f"out_{group}_token_w"]
        assert_close(normalised(theirs, theirs > -1), _weights(case, block, names), atol=2e-3 * _most(theirs), rtol=0)


def check_inputs(case: Case) -> None:
    for group, names, block in _groups(case):
        for stream, rows in (("x", block.exact), ("xq", block.reached)):
            if f"out_{group}_{stream}" in case:
                theirs = case[f"out_{group}_{stream}"]
                (ours,) = rows(names[0])
                off = (ours.x.view_as(theirs) - theirs).abs() > 1e-4 * _most(theirs)
                assert off.float().mean() < 0.005  # a step of rounding may fall to the other side


def check_search(case: Case) -> None:
    for group, names, block in _groups(case):
        found = _found(case, group, names, block)
        if f"out_{group}_loss" in case:
            assert_close(found.losses.float(), case[f"out_{group}_loss"], rtol=1e-4, atol=0)
        else:
            assert_close(float(found.losses.min()), case[f"out_{group}_best_loss"], rtol=1e-3, atol=0)
        assert found.ratio == case[f"out_{group}_ratio"]
        assert_close(found.scale, case[f"out_{group}_scale"], rtol=1e-4, atol=0)


def _most(values: Tensor) -> float:
    return float(values.abs().max())


class Published(QIG):
    """With the code's grids, which need not span 0: of groups with weights of one sign they cut some off."""

    def rounded(self, weight: Tensor) -> Tensor:
        span = spans(weight, self.group_size, zero=self.symmetric)
        return Grid.between(*span, self.bits, self.symmetric).rounded(weight)


def _stream(case: Case) -> Stream:
    return "reached" if case["weight_activation"] else "exact"


def _method(case: Case) -> QIG:
    return Published(
        bits=case["w_bits"],
        group_size=case["group_size"],
        symmetric=case["a_bits"] < 16,
        activations=case["a_bits"],
        loss="mse" if case["mse"] else "mae",
        released=True,
    )


def _groups(case: Case) -> Iterator[tuple[str, tuple[str, ...], Trial]]:
    """Each group of a case on a block in which the groups before it were placed as the code placed them."""
    block = trial(case)
    for group, names in GROUPS.items():
        searched = f"out_{group}_scale" in case
        if searched:
            yield group, names, block
        if not case["weight_activation"]:
            continue
        scale = case.get(f"out_{group}_scale")
        for name in names:
            weight = block.weight(name) if scale is None else block.weight(name) * scale
            grid = Grid.of(weight, case["w_bits"])
            block.place(name, Replaced(grid, grid.integers(weight), scale, case["a_bits"]))


def _weights(case: Case, block: Trial, names: tuple[str, ...]) -> Tensor:
    if case["call_counter"] == 0:  # the slip that its authors name: the first groups have equal weights
        there = case["ans_mask"].bool() | case["vis_mask"].bool()
        return normalised(there.float(), there)
    stream = _stream(case)
    (exact,), (part,) = block.inspect(names), block.inspect(names, stream)
    return _method(case).weigh(block, exact, part)


def _found(case: Case, group: str, names: tuple[str, ...], block: Trial) -> Found:
    method, stream = _method(case), _stream(case)
    weights = _weights(case, block, names)
    return method.searched(
        block.inspect(names, stream),
        {name: block.weight(name) for name in names},
        mean_size(block, names[0], stream),
        lambda part: weights / weights.sum(),
    )
