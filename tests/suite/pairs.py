"""Which method runs on which anatomy, and with which parameters on models this small.

A method that registers is covered: without an entry in `VARIANTS` it runs with its defaults and, if it has a budget, with
``keep=0.4``. Pairs that `check` refuses are tested to be refused with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from foveate.core import registry
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.method import Method, Pictures
from foveate.core.recipe import Recipe, build
from foveate.core.roles import Role
from foveate.core.traits import Traits
from foveate.core.weights import Weights
from foveate.engine.calibrate import Calibration
from foveate.engine.check import check
from foveate.engine.linears import blocks_of, digest
from foveate.engine.quantize import quantize, refuse
from foveate.methods import ALVTS, RTN, UAT, MASQuant, MoDES
from foveate.methods.before_encoder.index_preserving import train
from foveate.models import Anatomy, anatomy
from tests import tiny
from tests.suite.bodies import BODIES, FILMS, ONE, SEVERAL, TEXTS, Body
from tests.thirdparty import installed

VARIANTS: dict[str, list[dict[str, Any]]] = {
    "aircache": [{"keep": 0.4, "alpha": 0.5}, {"keep": 6, "among": "row"}],
    "cdpruner": [{"keep": 6}, {"keep": 0.4, "relevance": "embedding", "weight": 1.0, "positions": "anchor"}],
    "awq": [{"group_size": 16}],
    "alvts": [{"keep": 0.4}, {"ratios": (1.0, 0.5, 0.25, 0.0)}],
    "btp": [{"layers": (1, 2, 3), "ratios": (0.6, 0.5, 0.0)}, {"layers": (1, 3), "ratios": (0.5, 0.4), "preset": "qwen"}],
    "attentionpack": [
        {"rank": 6},
        {"rank": 5, "value_rank": 8, "shares": (0.2, 0.3, 0.5), "ranks": (1.0, 0.5, 0.2), "grouping": "prompt"},
        {"rank": 9, "shares": (1.0,), "ranks": (1.0,), "least": 27},
    ],
    "apet": [{"keep": 4, "basis": 2}, {"keep": 0.3, "basis": 2, "entering": 2.0, "layer": 1, "blend": 0.5, "ridge": 0.1}],
    "blink": [
        {"band": (1, 2), "region": 2, "expand": 1.0, "drop": 0.5},
        {"band": (1, 3), "region": 3, "expand": 1.3, "drop": 1.3},
    ],
    "coin": [{"keep": 6}, {"keep": 0.4, "scale": "raw", "positions": "anchor"}],
    "dart": [
        {"keep": 6},
        {"keep": 0.4, "layer": 1, "visual_pivots": 2, "text_pivots": 1},
        {"keep": 5, "space": "embedding"},
    ],
    "core": [{"similarity": 0.3}, {"keep": 6}, {"keep": 0.4, "similarity": 1.0}],
    "docprune": [
        {"tau_bg": 0.02, "tau_att": 0.9, "layer": 2},
        {"tau_bg": 0.0, "tau_comp": 3.15, "tau_att": 1.0, "score": "kv_group"},
    ],
    "divprune": [{"keep": 6}, {"keep": 0.4, "layer": 1, "positions": "anchor"}],
    "embedlens": [{}, {"drop": "sinks"}, {"ids": tuple(range(0, tiny.VOCABULARY, 7)), "top_k": 2}],
    "dtr": [{"keep": 6}, {"keep": 0.4, "layer": 3, "rate": 0.3, "lam": 0.01, "steps": 2}],
    "duet_vlm": [
        {"dominant": 6, "contextual": 3, "pool": 2},
        {"dominant": 0.3, "contextual": 0.2, "place": "embeddings", "layers": (1, 3), "ratios": (0.6, 0.3)},
    ],
    "evs": [{"rate": 0.5}, {"rate": 0.7, "positions": "anchor"}],
    "fastv": [{"keep": 6}, {"keep": 0.4, "layer": 1, "score": "all"}],
    "flowcut": [{"keep": 6}, {"keep": 0.4, "entropy": 0.9, "every": 1, "layer": 2, "entering": 2.0}],
    "flashcache": [{"keep": 0.4}, {"keep": 6, "tokens": "visual", "gamma": 0.1, "recent": 3}],
    "folder": [{"keep": 6}, {"keep": 0.4, "form": "features"}],
    "prumerge": [{"keep": 6}, {"keep": 7, "plus": True, "reading": "paper"}, {}, {"plus": True}],
    "omnizip_av": [{}, {"steps": 1, "context": 0.0}],
    "ppe": [{"keep": 0.45}, {"keep": 0.6, "order": "distance", "arrange": "raster"}],
    "feather": [{}, {"kappa": 0.4, "stride": 2, "layers": (1, 3), "keep2": 0.5}],
    "halfv": [
        {"ssr_layer": 2},
        {"ivr_ratio": 0.5, "attention": 0.0, "ssr_layer": 3, "ssr": "prune", "ssr_ratio": 0.2, "scaled": True},
    ],
    "h2o": [
        {"keep": 0.4},
        {"keep": 9, "recent": 0.3},
        {"keep": 0.5, "recent": 0.0, "received": "mean", "steps": False},
        {"keep": 6, "steps": False, "tokens": "visual"},
    ],
    "hawk": [
        {"keep": 6},
        {"keep": 0.4, "weights": (0.5, 0.1, 0.0, 0.4), "normalise": "softmax", "skip": 1, "tail": 2, "positions": "auto"},
        {"keep": 5, "normalise": "minmax"},
    ],
    "hidrop": [
        {"late_entry": 2, "layer_list": (2,), "keep_list": (6,), "early_exit": 4},
        {"late_entry": 1, "layer_list": (1, 2), "keep_list": (0.5, 3), "early_exit": 0},
    ],
    "hi_lo_prune": [
        {"keep": 6, "threshold": 0.8, "share": 0.4},
        {
            "keep": 0.4,
            "layer": 1,
            "candidates": 0.4,
            "start": "isolated",
            "fusion": 2.0,
            "share": 0.5,
            "among": "candidates",
        },
        {"keep": 5, "fusion": 0.0},
        {"keep": 5, "layer": 0},
    ],
    "hiprune": [{"keep": 6}, {"keep": 7, "positions": "anchor", "alpha": 1.0}],
    "ivc_prune": [{}, {"layer": 1, "mode": "fixed"}, {"mode": "union", "context": 0.3, "anchor": 0.1}],
    "information_horizon": [
        {"first": 9, "beyond": 3, "horizon": 2},
        {"first": 0.6, "beyond": 0, "first_layer": 1, "horizon": 3, "positions": "anchor"},
    ],
    "index_preserving": [{}, {"text_after": "keep"}],
    "merge3d": [
        {"keep": 6, "geometry": "none"},
        {"keep": 0.4, "geometry": "none", "pool": "item", "positions": "anchor"},
    ],
    "meteor": [
        {"factor": 10.0},
        {"factor": 20.0, "heads": 1, "layer": 2, "encoding": 0.7, "fusion": 0.6},
    ],
    "metom": [
        {"tau": 0.0, "budget": 0.6, "tau_tem": 0.3, "rate": 0.4},
        {"budget": 0.8, "tau_tem": 0.1, "layers": (1, 2), "rate": 0.2},
    ],
    "masquant": [{"epochs": 0, "activations": 16}],
    "mbq": [{"group_size": 16}],
    "mixkv": [
        {"keep": 0.5, "window": 4},
        {"keep": 0.5, "window": 4, "host": "adakv"},
        {"keep": 0.5, "window": 4, "host": "pyramidkv"},
    ],
    "kivi": [{"size": 8, "residual": 4}, {"bits": 4, "size": 16, "residual": 0}, {"bits": 8, "size": 8, "residual": 9}],
    "modes": [{}, {"tau_text": 0.03, "tau_vision": 0.12}, {"tau_text": 2.0, "tau_vision": 2.0}],
    "pixelprune": [{"threshold": 0.38, "metric": "rms"}, {"threshold": 0.303, "metric": "mean", "anchored": False}],
    "pool": [{"most": 6}, {"most": 0.4, "positions": "anchor"}],
    "prefixkv": [{"keep": 0.5, "distance": -4}, {"keep": 8, "search": "bisect"}],
    "press": [
        {"keep": 0.4},
        {"keep": 6, "press": "SnapKVPress(window_size=4)", "tokens": "all"},
        {"keep": 0.5, "press": "AdaKVPress(ExpectedAttentionPress())"},
        {"keep": 0.5, "press": "ChunkKVPress(KnormPress(), chunk_length=4)", "tokens": "all"},
    ],
    "prune2drive": [{"keep": 0.4}, {"keep": 6, "layer": 0}],
    "pyramiddrop": [{}, {"layers": (1, 3), "ratios": (0.6, 0.0), "positions": "anchor"}],
    "pyramidkv": [
        {"keep": 0.5, "window": 4, "beta": 3},
        {"keep": 0.5, "window": 4, "reading": "original"},
        {"keep": 6, "window": 4, "beta": 4, "tokens": "visual"},
    ],
    "rtn": [{"bits": 4, "clip": True}],
    "ls_vit": [{"activations": 4, "group_size": 16, "steps": 3, "candidates": 16, "rounds": 1}],
    "gptq": [{"bits": 4, "group_size": 8, "symmetric": False, "ordered": True}],
    "vlm_ptq": [{"bits": 4, "mu": 0.5}],
    "qig": [{"group_size": 16, "points": 3}],
    "quant_experts": [{"activations": 16, "important": 8, "experts": 4, "shared_rank": 8, "routed_rank": 4}],
    "random": [{"keep": 6}, {"keep": 0.4, "positions": "anchor"}],
    "score": [{"keep": 6}, {"keep": 5, "salience": "received", "positions": "anchor"}],
    "scope": [{"keep": 6}, {"keep": 5, "saliency": "received", "positions": "anchor"}],
    "shortv": [{"layers": (1, 2)}, {"layers": (0, 3)}],
    "smoothquant": [{"activations": 16}],
    "stc": [{"keep": 6}, {"keep": 0.4, "interval": 1, "variant": "released", "positions": "anchor"}],
    "random_kv": [{"keep": 0.4}, {"keep": 6, "tokens": "visual"}],
    "snapkv": [{"keep": 0.5, "window": 4}, {"keep": 6, "window": 4, "tokens": "visual"}],
    "streamingllm": [{"keep": 0.4}, {"keep": 22, "sinks": 2}, {"keep": 9, "steps": False}],
    "tome": [{"keep": 6}, {"keep": 0.4, "proportional": False, "weighted": False}],
    "sparsevila": [{"keep": 6, "decode_keep": 0.5}, {"keep": 1.0, "decode_keep": 0.4}],
    "sparsevlm": [
        {"counts": (8, 5, 0.2)},
        {"layers": (1, 3), "counts": (0.5, 2), "plus": True, "heads": 2},
        {"layers": (2,), "rank": (0.9, 1.0), "positions": "anchor"},
    ],
    "transprune": [{}, {"layers": (1, 3), "ratios": (0.6, 0.3), "accumulate": (1, 2)}],
    "uat": [{"tau": 0.052}, {"tau": 0.045, "layers": (1, 3)}],
    "uniform": [{"keep": 6}, {"keep": 0.4, "positions": "anchor"}],
    "vlm_pruner": [{"keep": 6}, {"keep": 0.4, "layer": 1, "tau": 0.2, "batch": 3, "channels": 8}],
    "vidcom2": [{"keep": 6}, {"keep": 0.4, "channels": 1.0, "temperature": 0.1, "positions": "anchor"}],
    "visionzip": [{"keep": 6}, {"keep": 0.4, "contextual": 3, "place": "embeddings"}],
    "zoo_prune": [{"keep": 6}, {"keep": 0.4, "directions": 5, "h": 0.1, "positions": "anchor"}, {"keep": 5, "rank": 3}],
    "v2drop": [{}, {"layers": (1, 3), "ratios": (0.5, 0.4)}],
}


FILMED = {"evs", "metom", "stc", "vidcom2"}
"""Methods that look from one frame of a video to the next: the suite shows them videos, too."""
JOINED = {"fastv", "flowcut", "meteor", "random", "snapkv"}
"""Methods that the suite runs on a family of several encoders, too, or sees refused there."""


def variants(name: str) -> list[Method]:
    """The settings in which the suite runs a method."""
    if name in VARIANTS:
        return [build(name, parameters) for parameters in VARIANTS[name]]
    kind = registry.get(name)
    return [build(name, {kind.budgeted: 0.4} if kind.takes_budget() else {})]


def tier(method: Method) -> Any:
    """The method as a case: of the first tier in the first of its settings; of those that replace weights rtn alone, as they
    all run by the same code.
    """
    known = method.name in registry.methods() and (method.name == "rtn" or not isinstance(method, Weights))
    marks = [] if known and method == variants(method.name)[0] else [pytest.mark.slow]
    return pytest.param(method, id=str(method), marks=marks)


QUANTIZED = ("llava-clip", "gemma3", "qwen2_5_vl", "qwen3_5")
"""Bodies that the suite has all methods on that replace weights. On others there is rtn alone: they all run by the same
code, and what each of them makes is in `test_weights.py`."""


@cache
def parts(body: Body | str) -> Anatomy:
    """The anatomy of a body, or of the one of that name."""
    body = BODIES[body] if isinstance(body, str) else body
    return anatomy(body.model())


@cache
def artifacts(body: Body | str) -> tuple[Artifact, ...]:
    """What methods need that are trained, calibrated or quantized on a body (or the one of that name), if it hosts them."""
    body = BODIES[body] if isinstance(body, str) else body
    return (*_learned(body), *(_rounded(body, method) for method in _replacing(body)))


@cache
def _named(body: Body) -> tuple[Artifact, ...]:
    """The same for who only asks whether there are any: no weights are quantized while tests are collected."""
    return (*_learned(body), *(method.artifact(parts(body).traits().fingerprint, {}) for method in _replacing(body)))


@cache
def _learned(body: Body) -> tuple[Artifact, ...]:
    made, traits = [], parts(body).traits()
    if not traits.recurrent and traits.sees:
        # What the selectors are worth is nothing to the suite: two steps stand for the default's.
        numbers = ALVTS(steps=2).calibrate(Calibration(body.model(), [body.inputs(ONE)]))
        made.append(ALVTS().artifact(traits.fingerprint, numbers))
    if traits.sparse:
        # Some of every modality's experts go at these thresholds; `tests/methods/test_modes.py` looks for good ones.
        factors = [[0.2, 0.3] if layer in traits.sparse else [0.0, 0.0] for layer in range(traits.decoder_layers)]
        numbers = {"factors": torch.tensor(factors), "thresholds": [0.06, 0.09], "special": torch.tensor([1, 8, 9, 20])}
        made.append(MoDES().artifact(traits.fingerprint, numbers))
    # Exit heads of chance, at every layer: some of them are sure enough of some tokens at the thresholds in `VARIANTS`.
    made.append(UAT().artifact(traits.fingerprint, exit_heads(traits, parts(body).config)))
    width = traits.decoder_layers, parts(body).config.hidden_size
    direction = torch.randn(width, generator=torch.Generator().manual_seed(0))
    made.append(Artifact("dtr", traits.fingerprint, {"direction": direction}))
    words = range(traits.fingerprint.vocabulary)
    made.append(Artifact("embedlens", traits.fingerprint, {"sinks": [*words[::4]], "dead": [*words[1::4]]}))
    if traits.cell is not None:
        cells = torch.randn(64, *traits.cell, generator=torch.Generator().manual_seed(0))
        weights = train(cells, cells[:, 0, 0, 0] > 0, hidden=8, steps=20)
        made.append(Artifact("index_preserving", traits.fingerprint, weights | {"cell": list(traits.cell)}))
    return tuple(made)


def _replacing(body: Body) -> Iterator[Weights]:
    """Methods that can replace weights of a body; on most, rtn alone."""
    for kind in (kind for kind in registry.methods().values() if issubclass(kind, Weights)):
        if kind is not RTN and body.name not in QUANTIZED:
            continue
        method = variants(kind.name)[0]
        assert isinstance(method, Weights)
        with suppress(FoveateError):  # `refusal` says why
            refuse(method, parts(body))
            yield method


def _rounded(body: Body, method: Weights) -> Artifact:
    """Weights rounded to nearest, in the place of what the method makes of them: that is tested in `test_weights.py`."""
    if not method.streams:
        return quantize(parts(body).model, method)
    kind = RTN if method.part == "decoder" else _OfEncoders
    found = _nearest(body, kind(method.bits, method.group_size, method.symmetric, method.activations))
    numbers = found.numbers if method.ordinary else {**found.numbers, **_sides(found.numbers, isinstance(method, MASQuant))}
    return replace(found, method=method.name, parameters=method.bound(), numbers=numbers)


def _sides(numbers: Mapping[str, Any], by_role: bool) -> dict[str, torch.Tensor]:
    """Products of low rank by chance beside each linear: for pictures alone, or for each row one of three."""
    chance, found = torch.Generator().manual_seed(0), dict[str, torch.Tensor]()
    for linear in (name.removesuffix(".words") for name in numbers if name.endswith(".words")):
        out, inputs = len(numbers[f"{linear}.words"]), int(numbers[f"{linear}.form"][1])
        count = 1 if by_role else 3
        down = torch.randn(count, 4, inputs, generator=chance) / inputs**0.5
        up = torch.randn(count, 4, out, generator=chance) / 20
        prefix = f"{linear}.role0_side0" if by_role else f"{linear}.side0"
        found |= {f"{prefix}_down": down, f"{prefix}_up": up}
        if by_role:
            found[f"{linear}.role0_roles"] = torch.tensor([Role.IMAGE, Role.VIDEO, Role.NEWLINE])
            found[f"{linear}.role0_divide"] = torch.rand(inputs, generator=chance) + 0.5
        else:
            found[f"{linear}.side0_router"] = torch.rand(count, inputs, generator=chance)
    return found


class _OfEncoders(RTN):
    """The same for methods that replace weights of the encoder."""

    part = "encoder"


@cache
def _nearest(body: Body, plain: RTN) -> Artifact:
    return quantize(parts(body).model, plain)


def exit_heads(traits: Traits, config: Any) -> dict[str, Any]:
    """Numbers of UAT that come by chance, for exits before every layer but the first."""
    layers, width = [*range(1, traits.decoder_layers)], config.hidden_size
    chance = torch.Generator().manual_seed(0)
    down = torch.randn(len(layers), 2, width, generator=chance) * 0.1
    up = torch.randn(len(layers), width, 2, generator=chance)
    weight = torch.randn(traits.fingerprint.vocabulary + 2, generator=chance)
    return {"layers": layers, "down": down, "up": up, "bias": torch.zeros(len(layers), width), "reliability": weight}


def lent(body: Body | str, model: Any) -> list[Artifact]:
    """The same for another model of that shape, where it does not matter what the numbers are."""
    there = anatomy(model)
    fingerprint = there.traits().fingerprint
    return [replace(each, fingerprint=fingerprint, numbers=_lent(each, there)) for each in artifacts(body)]


def _lent(artifact: Artifact, there: Anatomy) -> Mapping[str, Any]:
    if "digests" not in artifact.numbers:
        return artifact.numbers
    return {**artifact.numbers, "digests": [digest(block) for block in blocks_of(there, artifact.numbers["part"])]}


def refusal(method: Method, body: Body) -> str | None:
    """Why the anatomy cannot host the method, or None."""
    try:
        check(Recipe((method,)), parts(body), parts(body).traits(artifacts=_named(body)))
    except FoveateError as error:
        return str(error)
    return None


def _params(hosted: bool, texts: bool = False) -> list[Any]:
    found = []
    for name in registry.methods():
        for number, method in enumerate(variants(name)):
            more = (*(FILMS.values() if name in FILMED else ()), *((SEVERAL,) if name in JOINED else ()))
            for body in TEXTS.values() if texts else (*BODIES.values(), *more):
                if (refusal(method, body) is None) != hosted:
                    continue
                # Bodies are given pixels: pictures come before (tests/methods/test_downsample.py).
                if hosted and isinstance(method, Pictures):
                    continue
                # First tier: each method in one setting on one anatomy, each anatomy with one method.
                first = body.name in ("llava-clip", "qwen2_vl-video") or name == "fastv" or not hosted
                first = first or (name == "meteor" and body is SEVERAL)
                first = first or (name in ("h2o", "snapkv") and body is TEXTS["text"])
                marks = [] if first and number == 0 else [pytest.mark.slow]
                found.append(pytest.param(method, body, id=f"{body.name}-{method}", marks=marks))
    return found


with installed():  # a method of somebody else's gets the suite for nothing
    HOSTED = _params(hosted=True)
    REFUSED = _params(hosted=False)
    READ = _params(hosted=True, texts=True)
    """The same of text models."""
    UNREAD = _params(hosted=False, texts=True)
