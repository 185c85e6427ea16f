"""What a method costs the host beside the unmodified model: waits whatever the depth, kernels and calls while decoding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch

from foveate.core import registry
from foveate.core.device import upload
from foveate.core.exits import Exits
from foveate.core.method import Cache, Method, Routing
from foveate.core.weights import Weights
from tests import pretend, tiny
from tests.suite.bodies import ONE, RAGGED
from tests.suite.pairs import parts, refusal, tier, variants
from tests.thirdparty import installed
from tests.waits import Waits, body, calls, elsewhere, kernels, turns, waits

BATCHES = {"one": ONE, "ragged": RAGGED}
SHALLOW, DEEP, CLIP = 8, 16, 24


def methods() -> list[Method]:
    """Those that models of both depths can host."""
    with installed():
        found = [method for name in registry.methods() for method in variants(name)]
    return [method for method in found if not any(refusal(method, body(layers)) for layers in (SHALLOW, DEEP))]


def one_of_each_group() -> Iterator[Any]:
    """Every method; in the first tier one of each group."""
    seen = set[str]()
    for method in METHODS:
        yield pytest.param(method, id=str(method), marks=[pytest.mark.slow] if method.group in seen else [])
        seen.add(method.group)


METHODS = methods()
every = pytest.mark.parametrize("method", map(tier, METHODS))
STORED = {"mixkv": 0.7, "attentionpack": 1.1, "kivi": 0.5, "h2o": 0.55}
"""Attention over a cache some of which is in a store takes so many more kernels: to join blocks by head, to make keys and
values anew, to turn keys. A tally hears attention, and chooses in each head what goes."""
# Layers that rows skipped hold different tokens, as compressed caches do.
compressing = pytest.mark.parametrize("method", [tier(m) for m in METHODS if isinstance(m, Cache | Routing)])
# Who lets tokens leave early works in every step of decoding: what that costs is told apart below.
idle = pytest.mark.parametrize("method", [tier(m) for m in METHODS if not isinstance(m, Cache | Routing | Exits | Weights)])
# On this device no kernel of torch's takes packed weights, so that they are unpacked in each step.
replacing = pytest.mark.parametrize("method", [tier(m) for m in METHODS if isinstance(m, Weights)])
LINEARS = 7 * DEEP
"""Of the deeper model."""
# Whoever renumbers between layers leaves them with tables of their own.
turning = {"apet", "duet_vlm", "flowcut", "information_horizon", "pyramiddrop", "sparsevlm", "transprune"}
# Who decides by what layers show, as published: flowcut how many go in every second block of the encoder, docprune behind
# each layer whether a sample is to be cut. Both have a parameter by which they need not look.
looking = {"flowcut": (DEEP - SHALLOW) // 2, "docprune": DEEP - SHALLOW}
batch = pytest.mark.parametrize("batch", [pytest.param("one", marks=pytest.mark.slow), "ragged"])


@every
def test_a_prompt_waits_twelve_times_at_most(method: Method) -> None:
    deep, own = (counted(waits, DEEP, "ragged", of)[0] for of in (method, None))

    assert len(deep) - len(own) <= 12, listed(deep)  # a wait in every layer would be sixteen


@pytest.mark.parametrize("method", [*one_of_each_group()])
def test_a_prompt_waits_as_often_whatever_the_depth(method: Method) -> None:
    shallow, deep = waits(SHALLOW, RAGGED, method, steps=0)[0], counted(waits, DEEP, "ragged", method)[0]

    assert abs(len(deep) - len(shallow)) <= looking.get(method.name, 0), listed(deep)


@pytest.mark.slow
def test_flowcut_waits_twelve_times_at_most_in_the_published_encoder_and_with_its_entropy_set_whatever_the_depth() -> None:
    published, own = (waits(CLIP, RAGGED, recipe, steps=0)[0] for recipe in ("flowcut(keep=6)", None))
    shallow, deep = (waits(layers, RAGGED, "flowcut(keep=6, entropy=0.9)", steps=0)[0] for layers in (SHALLOW, DEEP))

    assert len(published) - len(own) <= 12, listed(published)
    assert len(deep) == len(shallow), listed(deep)


@pytest.mark.parametrize("recipe", ["ivc_prune", "snapkv(keep=0.5, window=4)", "sparsevila(keep=1.0, decode_keep=0.4)"])
def test_behind_layers_that_hold_different_tokens_a_prompt_waits_no_more(recipe: str) -> None:
    routed = f"alvts(keep=0.4) + {recipe}"
    shallow, deep = (waits(layers, RAGGED, routed, steps=0)[0] for layers in (SHALLOW, DEEP))

    assert len(deep) == len(shallow), listed(deep)


@pytest.mark.parametrize(
    "recipe",
    [
        "snapkv(keep=0.5, window=4)",
        "prefixkv(keep=0.5)",
        "aircache(keep=0.4)",
        "flashcache(keep=0.4)",
        "alvts(keep=0.4) + sparsevila(keep=1.0, decode_keep=0.4)",
    ],
)
def test_a_later_turn_waits_whatever_the_depth_no_more(recipe: str) -> None:
    shallow, deep = (turns(layers, recipe, [_prompt(layers), _prompt(layers)])[1] for layers in (SHALLOW, DEEP))

    assert len(deep) == len(shallow), listed(deep)
    assert len(deep) - len(turns(DEEP, None, [_prompt(DEEP)])[0]) <= 12, listed(deep)


def test_a_prompt_that_ends_in_its_picture_waits_whatever_the_depth_no_more() -> None:
    shallow, deep = (turns(layers, "alvts(keep=0.4)", [_prompt(layers, ends=True)])[0] for layers in (SHALLOW, DEEP))

    assert len(deep) == len(shallow), listed(deep)


def test_what_a_prompt_says_is_read_before_its_pictures_are_encoded() -> None:
    encoded: list[tuple[Waits, int]] = []

    def note(*_: Any) -> None:
        so_far = pretend.Pretended.current().waits
        encoded.append((so_far, len(so_far)))

    with pretend.Pretended():
        tower = elsewhere(SHALLOW).model.vision_tower
    with tower.register_forward_hook(note):
        for recipe in (None, "uniform(keep=6)"):
            turns(SHALLOW, recipe, [_prompt(SHALLOW)])
    own, found = (waited[count:] for waited, count in encoded)

    assert len(found) == len(own), listed(found)


def _prompt(layers: int, ends: bool = False) -> dict[str, torch.Tensor]:
    inputs = body(layers).inputs(ONE)
    ids = inputs["input_ids"]
    if ends:
        ids = ids[:, : int((ids == tiny.IMAGE).nonzero()[-1, 1]) + 1]
    return {"input_ids": ids, "pixel_values": inputs["pixel_values"]}


@every
def test_decoding_waits_for_nothing(method: Method) -> None:
    found, own = (counted(waits, DEEP, "ragged", of)[1] for of in (method, None))

    assert len(found) - len(own) <= deciding(method), listed(found)


def deciding(method: Method) -> int:
    """How often a step of decoding waits to hear whether anybody goes on: once at each exit."""
    return len(method.exits(parts(body(DEEP)).traits())) if isinstance(method, Exits) else 0


def test_whoever_lets_tokens_leave_and_nobody_does_waits_at_each_exit_whatever_the_depth() -> None:
    (_, shallow), (_, deep) = (waits(layers, RAGGED, "uat(tau=1.0)") for layers in (SHALLOW, DEEP))
    own = counted(waits, DEEP, "ragged")[1]

    assert len(shallow) == len(deep) == len(own) + 3, listed(deep)


def test_a_bandit_waits_once_more_for_its_reward() -> None:
    (prompt, step), (before, own) = (waits(DEEP, RAGGED, recipe) for recipe in ("uat(arms=(1.0,))", "uat(tau=1.0)"))

    assert (len(prompt), len(step)) == (len(before) + 1, len(own) + 1), listed(step)


@compressing
@batch
def test_a_compressed_cache_starts_a_fifth_more_kernels_at_most(method: Method, batch: str) -> None:
    assert isinstance(method, Cache | Routing)
    heard = isinstance(method, Cache) and (method.by_head or type(method).pack is not Cache.pack or method.name == "h2o")
    more = STORED[method.name] if heard and getattr(method, "steps", True) else 0.2
    assert counted(kernels, DEEP, batch, method) <= (1 + more) * counted(kernels, DEEP, batch)


@idle
@batch
def test_what_is_done_with_the_prompt_adds_five_percent_of_kernels_at_most(method: Method, batch: str) -> None:
    assert counted(kernels, DEEP, batch, method) <= 1.05 * counted(kernels, DEEP, batch)


@idle
def test_what_is_done_with_the_prompt_adds_five_percent_of_calls_at_most(method: Method) -> None:
    more = 0.15 if method.name in turning else 0.05
    assert counted(calls, DEEP, "one", method) <= (1 + more) * counted(calls, DEEP, "one")


@replacing
def test_what_stands_for_a_linear_starts_ten_kernels_and_calls_twenty_functions_at_most(method: Method) -> None:
    assert counted(kernels, DEEP, "one", method) <= counted(kernels, DEEP, "one") + 10 * LINEARS
    assert counted(calls, DEEP, "one", method) <= 1.05 * counted(calls, DEEP, "one") + 20 * LINEARS


@cache
def counted(count: Callable[..., Any], layers: int, batch: str, method: Method | None = None) -> Any:
    return count(layers, BATCHES[batch], method)


def listed(found: Waits) -> str:
    return "\n".join(f"{times} x {wait}" for wait, times in Counter(map(str, found)).most_common())


def test_what_waits_is_counted() -> None:
    with pretend.Pretended() as there:
        here = pretend.device(0)
        x, index = torch.ones(3, device=here), upload([0, 2, 1], here)
        assert not there.waits
        for work in (
            lambda: torch.tensor([1, 2], device=here),
            lambda: torch.ones(2).to(here),
            lambda: x.cpu(),
            lambda: x.tolist(),
            lambda: x.sum().item(),
            lambda: bool(x.any()),
            lambda: x.nonzero(),
            lambda: x[x > 0],
            lambda: x[torch.tensor([0, 1])],
            lambda: x.repeat_interleave(index),
        ):
            before = len(there.waits)
            work()
            assert len(there.waits) == before + 1


def test_what_does_not_wait_is_not_counted() -> None:
    with pretend.Pretended() as there:
        here = pretend.device(0)
        x, index = torch.ones(3, device=here), upload([0, 2, 1], here)
        x[index], x[0], x[1:], x * 2, x.sort(), x.to(pretend.device(1)), torch.tensor([], device=here)
        x.repeat_interleave(2), torch.ones(2).to(here, non_blocking=True)
        x[x > 1] = 0
        assert not there.waits
