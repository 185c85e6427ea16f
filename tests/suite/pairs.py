"""Which method runs on which anatomy, and with which parameters on models this small.

A method that registers is covered: without an entry in `VARIANTS` it runs with its defaults and, if it has a budget, with
``keep=0.4``. Pairs that `check` refuses are tested to be refused with a reason.
"""

from __future__ import annotations

from dataclasses import fields, replace
from functools import cache
from typing import Any

import pytest
import torch

from foveate.core import registry
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.method import Method
from foveate.core.recipe import Recipe, build
from foveate.engine.calibrate import Calibration
from foveate.engine.check import check
from foveate.methods import ALVTS
from foveate.methods.before_encoder.index_preserving import train
from foveate.models import Anatomy, anatomy
from tests.suite.bodies import BODIES, FILMS, ONE, Body
from tests.thirdparty import installed

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "cdpruner": [{"keep": 6}, {"keep": 0.4, "relevance": "embedding", "weight": 1.0, "positions": "anchor"}],
    "alvts": [{"keep": 0.4}, {"ratios": (1.0, 0.5, 0.25, 0.0)}],
    "coin": [{"keep": 6}, {"keep": 0.4, "scale": "raw", "positions": "anchor"}],
    "divprune": [{"keep": 6}, {"keep": 0.4, "layer": 1, "positions": "anchor"}],
    "evs": [{"rate": 0.5}, {"rate": 0.7, "positions": "anchor"}],
    "fastv": [{"keep": 6}, {"keep": 0.4, "layer": 1, "score": "all"}],
    "folder": [{"keep": 6}, {"keep": 0.4, "form": "features"}],
    "prumerge": [{"keep": 6}, {"keep": 7, "plus": True, "reading": "paper"}, {}, {"plus": True}],
    "ppe": [{"keep": 0.45}, {"keep": 0.6, "order": "distance", "arrange": "raster"}],
    "feather": [{}, {"kappa": 0.4, "stride": 2, "layers": (1, 3), "keep2": 0.5}],
    "hidrop": [
        {"late_entry": 2, "layer_list": (2,), "keep_list": (6,), "early_exit": 4},
        {"late_entry": 1, "layer_list": (1, 2), "keep_list": (0.5, 3), "early_exit": 0},
    ],
    "hiprune": [{"keep": 6}, {"keep": 7, "positions": "anchor", "alpha": 1.0}],
    "ivc_prune": [{}, {"layer": 1, "mode": "fixed"}, {"mode": "union", "context": 0.3, "anchor": 0.1}],
    "index_preserving": [{}, {"text_after": "keep"}],
    "metom": [
        {"tau": 0.0, "budget": 0.6, "tau_tem": 0.3, "rate": 0.4},
        {"budget": 0.8, "tau_tem": 0.1, "layers": (1, 2), "rate": 0.2},
    ],
    "mixkv": [
        {"keep": 0.5, "window": 4},
        {"keep": 0.5, "window": 4, "host": "adakv"},
        {"keep": 0.5, "window": 4, "host": "pyramidkv"},
    ],
    "pixelprune": [{"threshold": 0.38, "metric": "rms"}, {"threshold": 0.303, "metric": "mean", "anchored": False}],
    "prefixkv": [{"keep": 0.5, "distance": -4}, {"keep": 8, "search": "bisect"}],
    "prune2drive": [{"keep": 0.4}, {"keep": 6, "layer": 0}],
    "pyramiddrop": [{}, {"layers": (1, 3), "ratios": (0.6, 0.0), "positions": "anchor"}],
    "random": [{"keep": 6}, {"keep": 0.4, "positions": "anchor"}],
    "score": [{"keep": 6}, {"keep": 5, "salience": "received", "positions": "anchor"}],
    "scope": [{"keep": 6}, {"keep": 5, "saliency": "received", "positions": "anchor"}],
    "shortv": [{"layers": (1, 2)}, {"layers": (0, 3)}],
    "snapkv": [{"keep": 0.5, "window": 4}],
    "tome": [{"keep": 6}, {"keep": 0.4, "proportional": False, "weighted": False}],
    "sparsevila": [{"keep": 6, "decode_keep": 0.5}, {"keep": 1.0, "decode_keep": 0.4}],
    "transprune": [{}, {"layers": (1, 3), "ratios": (0.6, 0.3), "accumulate": (1, 2)}],
    "uniform": [{"keep": 6}, {"keep": 0.4, "positions": "anchor"}],
    "v2drop": [{}, {"layers": (1, 3), "ratios": (0.5, 0.4)}],
}


FILMED = {"evs", "metom"}
"""Methods that look from one frame of a video to the next: the suite shows them videos, too."""


def variants(name: str) -> list[Method]:
    """The settings in which the suite runs a method."""
    if name in VARIANTS:
        return [build(name, parameters) for parameters in VARIANTS[name]]
    has_budget = any(field.name == "keep" for field in fields(registry.get(name)))
    return [build(name, {"keep": 0.4} if has_budget else {})]


@cache
def parts(body: Body | str) -> Anatomy:
    """The anatomy of a body, or of the one of that name."""
    body = BODIES[body] if isinstance(body, str) else body
    return anatomy(body.model())


@cache
def artifacts(body: Body | str) -> tuple[Artifact, ...]:
    """What the methods that are trained or calibrated need on a body, or on the one of that name, if it can host them."""
    body, made = BODIES[body] if isinstance(body, str) else body, []
    traits = parts(body).traits()
    if not traits.recurrent:
        # What the selectors are worth is nothing to the suite: two steps stand for the default's.
        numbers = ALVTS(steps=2).calibrate(Calibration(body.model(), [body.inputs(ONE)]))
        made.append(ALVTS().artifact(traits.fingerprint, numbers))
    if traits.cell is not None:
        cells = torch.randn(64, *traits.cell, generator=torch.Generator().manual_seed(0))
        weights = train(cells, cells[:, 0, 0, 0] > 0, hidden=8, steps=20)
        made.append(Artifact("index_preserving", traits.fingerprint, weights | {"cell": list(traits.cell)}))
    return tuple(made)


def lent(body: Body | str, model: Any) -> list[Artifact]:
    """The same for another model of that shape, where it does not matter what the numbers are."""
    return [replace(artifact, fingerprint=anatomy(model).traits().fingerprint) for artifact in artifacts(body)]


def refusal(method: Method, body: Body) -> str | None:
    """Why the anatomy cannot host the method, or None."""
    try:
        check(Recipe((method,)), parts(body), parts(body).traits(artifacts=artifacts(body)))
    except FoveateError as error:
        return str(error)
    return None


def _params(hosted: bool) -> list[Any]:
    found = []
    for name in registry.methods():
        for number, method in enumerate(variants(name)):
            for body in (*BODIES.values(), *(FILMS.values() if name in FILMED else ())):
                if (refusal(method, body) is None) != hosted:
                    continue
                # First tier: each method on one anatomy, each anatomy with one method.
                first = body.name in ("llava-clip", "qwen2_vl-video") or (name == "fastv" and number == 0)
                marks = [] if first or not hosted else [pytest.mark.slow]
                found.append(pytest.param(method, body, id=f"{body.name}-{method}", marks=marks))
    return found


with installed():  # a method of somebody else's gets the suite for nothing
    HOSTED = _params(hosted=True)
    REFUSED = _params(hosted=False)
