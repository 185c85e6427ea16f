"""MASQuant: scales by modality, the one weight, what mends it, and both of the code's forwards."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.testing import assert_close

from foveate.core.roles import Role
from foveate.engine.linears import dense
from foveate.engine.sides import TEXT, Present, saying
from foveate.methods import MASQuant
from foveate.methods.weights.masquant import learning, modality, ranges
from foveate.ops.grid import Grid, spans
from foveate.ops.scaling import smoothing
from foveate.ops.solve import Moments, whitened
from tests.vectors import Case

KINDS = ("text", "vision", "audio")


def check_ranges_and_scales(case: Case) -> None:
    found = ranges(case["x"].flatten(0, 1), _role(case).flatten())
    for kind, size in found.items():
        assert_close(size, case[f"out_absmax_{kind}"].clamp(min=1e-5))
        assert_close(smoothing(size, [case["weight"]], case["alpha"]), case[f"out_scale_{kind}"])
    assert all(kind in found or not case[f"out_absmax_{kind}"].any() for kind in KINDS)
    merged = case["x"].abs().amax((0, 1))
    assert_close(smoothing(merged, [case["weight"]], case["alpha"]), case["out_scale_merged"])


def check_weight(case: Case) -> None:
    weight = case["weight"] * case["out_scale_text"]
    assert_close(_method(case).grid(weight).rounded(weight), case["out_q_weight"], atol=1e-4, rtol=0)


def check_what_mends(case: Case) -> None:
    for kind, moments in _moments(case).items():
        scale = case[f"out_scale_{kind}"].double()
        assert_close((moments / scale / scale[:, None]).float(), case[f"out_covariance_{kind}"], rtol=1e-4, atol=1e-2)
        mine = case["weight"] * case[f"out_scale_{kind}"]
        target = _method(case).grid(mine).rounded(mine)
        missing = (target if case["quant_cmc"] else mine) - case["out_q_weight"]
        white = moments / scale / scale[:, None] if case["whiten"] else torch.eye(len(scale), dtype=torch.float64)
        left, right = whitened(missing, white, int(case[f"out_rank_{kind}"]), damping=0)
        assert_close((left @ right).mT, case[f"out_LR_{kind}"].double(), atol=1e-4, rtol=1e-3)


def check_inference(case: Case) -> None:
    if not case["whiten"]:
        return  # the method always does
    stand = dense(_method(case).replaced(case["weight"], _scales(case), _moments(case)), _linear(case))
    with saying(Present(_role(case))):
        _nearly(stand(case["x"]), case["out_y"])
    with saying(TEXT):
        _nearly(stand(case["x"][:, :1]), case["out_y_no_mask"])


def check_training(case: Case) -> None:
    stand = learning(case["weight"], _scales(case), _role(case), _method(case).grid, case["a_bits"])
    _nearly(stand(case["x"]) + case["bias"], case["out_y_train"])


def _role(case: Case) -> Tensor:
    role = torch.full(case["x"].shape[:2], int(Role.TEXT)).masked_fill(case["vision_mask"].bool(), int(Role.IMAGE))
    return role.masked_fill(case["audio_mask"].bool(), int(Role.AUDIO))


def _scales(case: Case) -> dict[str, Tensor]:
    there = {kind for kind, rows in modality(_role(case)).items() if bool(rows.any())}
    return {kind: case[f"out_scale_{kind}"] for kind in KINDS if kind in there}


def _moments(case: Case) -> dict[str, Tensor]:
    found = {}
    for kind, rows in modality(_role(case)).items():
        if f"out_covariance_{kind}" in case:
            moments = Moments(case["x"].shape[-1])
            moments.add(case["x"][rows], samples=2)
            found[kind] = moments.own
    return found


class Published(MASQuant):
    """With the code's grids, which need not span 0: of groups with weights of one sign they cut some off."""

    def grid(self, weight: Tensor, stored: torch.dtype | None = None) -> Grid:
        return Grid.between(*spans(weight, self.group_size, zero=self.symmetric), self.bits, self.symmetric)


def _method(case: Case) -> MASQuant:
    return Published(
        bits=case["w_bits"],
        group_size=case["group_size"],
        symmetric=bool(case["symmetric"]),
        activations=case["a_bits"],
        alpha=case["alpha"],
        rank=case["rank"],
        towards="rounded" if case["quant_cmc"] else "float",
    )


def _linear(case: Case) -> nn.Linear:
    linear = nn.Linear(*reversed(case["weight"].shape))
    linear.bias = nn.Parameter(case["bias"], requires_grad=False)
    return cast(nn.Linear, linear)


def _nearly(made: Tensor, expected: Tensor) -> None:
    """A number halfway between two may fall to the other side."""
    off = (made - expected).abs() > 1e-3 * expected.abs().amax()
    assert off.float().mean() < 0.005
