"""ZOO-Prune: how sensitive each token is, and the order of selection (of LLaVA-NeXT's tiles, each on its own)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.methods.before_llm.zoo_prune import relative, sensitivity
from foveate.ops.farthest import farthest_first
from tests.vectors import Case


def check_sensitivities(case: Case) -> None:
    if "sens" in case and "u_raw" in case:
        assert_close(_project(case, _tiles(case)).reshape(case["z"].shape), case["z"], atol=1e-5, rtol=0)
        found = sensitivity(_tiles(case), lambda x: _project(case, x), case["u_raw"], case["h"])

        assert_close(found.reshape(case["sens"].shape), case["sens"], atol=0, rtol=1e-3)


def check_order(case: Case) -> None:
    points = _tiles(case) if case["variant"] == "select" else _project(case, _tiles(case))
    sensitivities = case["sens_in"] if case["variant"] == "select" else case["sens"]
    weight = relative(sensitivities.reshape(points.shape[:2]))
    order = farthest_first(points, _count(case), first=weight.argmax(1), weight=weight)

    if case["variant"] == "next":
        label = case["frame_label"]
        place = [(label == tile).nonzero()[:, 0] for tile in range(len(order))]
        order = torch.cat([of[chosen] for of, chosen in zip(place, order)])[None]
        lines = (label < 0).nonzero()[:, 0]
        assert sorted([*order[0].tolist(), *lines.tolist()]) == case["keep"].tolist()
    else:
        assert sorted(order[0].tolist()) == case["keep"].tolist()
    assert order[0].tolist() == case["order"].tolist()


def _tiles(case: Case) -> Tensor:
    x: Tensor = case["x"]
    return x if x.ndim == 3 else x[None]


def _count(case: Case) -> int:
    if case["variant"] == "select":
        return int(case["k"])
    return int(case["k_tile"]) if case["variant"] == "next" else int(case["ratio"] * len(case["x"]))


def _project(case: Case, x: Tensor) -> Tensor:
    hidden = torch.nn.functional.gelu(torch.nn.functional.linear(x, case["w1"], case["b1"]))
    return torch.nn.functional.linear(hidden, case["w2"], case["b2"])
