"""What belongs to one call: threads do not mix, a call that dies leaves nothing, and nobody has to detach."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.recipe import Recipe
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from tests.suite.bodies import ONE, Body
from tests.suite.conversation import generate
from tests.suite.protocols import BLOCKS, FACTORS, LLAVA, PROTOCOLS, ROWS, STEPS, VIEW, attached, told
from tests.suite.test_memory import Live, no_collector

protocols = pytest.mark.parametrize(("body", "recipe"), PROTOCOLS.values(), ids=PROTOCOLS.keys())
THREADS = 6


# Threads.


@pytest.fixture
def hasty() -> Iterator[None]:
    """Threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    yield
    sys.setswitchinterval(before)


def at_once(work: Callable[[int], Any]) -> list[Any]:
    """What each thread's ``work`` returns, all of them begun together."""
    start = threading.Barrier(THREADS)

    def begun(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(begun, range(THREADS)))


@protocols
def test_threads_get_the_answers_and_the_reports_of_one(body: Body, recipe: Recipe, hasty: None) -> None:
    model = body.model()
    prompts = [body.inputs([(3, 1 + number % 2, 6 + number)], seed=number) for number in range(THREADS)]
    with attached(model, recipe, body) as session:

        def answer(number: int) -> tuple[list[int], Any]:
            return generate(model, prompts[number], 4).sequences.tolist(), told(session)

        alone = [answer(number) for number in range(THREADS)]
        for found in zip(*at_once(lambda number: [answer(number) for _ in range(2)])):
            assert list(found) == alone
        assert told(session) == alone[-1][1]


def test_a_thread_that_made_no_call_sees_the_last_one() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    with attached(model, "fastv(keep=4)") as session, ThreadPoolExecutor(1) as pool:
        generate(model, inputs, 2)
        assert pool.submit(told, session).result() == told(session)


def test_threads_with_models_of_their_own_do_not_disturb_each_other(hasty: None) -> None:
    recipes: list[Any] = [None, "none", "fastv(layer=2, keep=4)", ROWS, BLOCKS, FACTORS]
    models, inputs = [LLAVA.model() for _ in recipes], LLAVA.inputs(ONE)
    assert len(recipes) == THREADS
    sessions = [recipe and attached(model, recipe) for model, recipe in zip(models, recipes)]
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    alone = [generate(model, inputs, 5).sequences.tolist() for model in models]
    found = at_once(lambda number: [generate(models[number], inputs, 5).sequences.tolist() for _ in range(5)])
    assert found == [[one] * 5 for one in alone]
    assert dict(ALL_ATTENTION_FUNCTIONS._local_mapping) == before
    assert all(session is None or session.attached for session in sessions)


# A call that dies.


@dataclass(frozen=True)
class Dies(Tokens):
    """A method whose call at a site of a kind fails, as long as it is told to."""

    kind: str
    name = "dies"
    told = False

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site(self.kind, 1) if self.kind in ("encoder", "decoder") else Site(self.kind),)  # type: ignore[arg-type]

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        if Dies.told:
            raise torch.OutOfMemoryError("out of memory")
        return None


def dying(place: str, error: type[BaseException], hook: str, skip: int = 0) -> Callable[[Any], Callable[[], None]]:
    """Lets a hook of the user's on a module raise, the first calls apart."""

    def install(model: Any) -> Callable[[], None]:
        left = [skip]

        def die(*_: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise error("the end")

        module = model.get_submodule(place)
        kind = module.register_forward_hook if hook == "after" else module.register_forward_pre_hook
        return kind(die).remove  # type: ignore[no-any-return]

    return install


def told_to_die(model: Any) -> Callable[[], None]:
    Dies.told = True
    return lambda: setattr(Dies, "told", False)


LAYER, BLOCK = "model.language_model.layers.2", "model.vision_tower.encoder.layers.2"
OOM = torch.OutOfMemoryError
DEATHS = {
    **{f"out of memory in {at}": dying(at, OOM, "after") for at in (f"{LAYER}.mlp", f"{LAYER}.self_attn.q_proj")},
    "out of memory in the encoder": dying(f"{BLOCK}.mlp", OOM, "after"),
    "out of memory in the projector": dying("model.multi_modal_projector.linear_2", OOM, "before"),
    "out of memory behind the language model": dying("lm_head", OOM, "before"),
    "stopped in a layer": dying(f"{LAYER}.self_attn", KeyboardInterrupt, "before"),
    "stopped in a step of decoding": dying(f"{LAYER}.mlp", KeyboardInterrupt, "before", skip=3),
}
HOOKS = {  # behind the model itself a call is over
    f"{hook} {at}": dying(at, RuntimeError, hook)
    for at in ("", "model", "model.language_model", LAYER, "model.vision_tower", BLOCK)
    for hook in ("before", "after")
    if at or hook == "before"
}
DEADLY = [
    f"tome(keep=9) + fastv(layer=2, keep=5) + {ROWS}",
    f"index_preserving + shortv(layers=(1,)) + {BLOCKS}",
    f"hiprune(keep=9) + {VIEW}",
    f"alvts(keep=0.4) + {STEPS}",
    f"shortv(layers=(1,)) + {FACTORS}",
]


def die(model: Any, inputs: dict[str, Tensor], generating: bool) -> str:
    """Make a call that ends in an exception; its name."""
    try:
        if generating:
            generate(model, inputs, 8)
        else:
            model(**inputs, labels=inputs["input_ids"])
    except (Exception, KeyboardInterrupt) as error:
        return type(error).__name__
    raise AssertionError("it lived")


def next_calls(model: Any, session: Any) -> list[Any]:
    """What the calls that follow return, and what is told of them."""
    inputs = LLAVA.inputs([(2, 1, 9)], seed=5)
    found: list[Any] = [model(**inputs, labels=inputs["input_ids"]).loss, model(**inputs).logits, told(session)]
    output = generate(model, inputs, 3)
    return [*found, torch.stack(output.logits), told(session)]


@cache
def after_nothing(recipe: Recipe) -> list[Any]:
    """The same of a fresh session."""
    model = LLAVA.model()
    with torch.no_grad(), attached(model, recipe) as session:
        return next_calls(model, session)


@pytest.mark.parametrize("recipe", DEADLY)
@pytest.mark.parametrize("death", DEATHS)
def test_a_call_that_dies_leaves_nothing(death: str, recipe: str) -> None:
    assert_nothing_is_left(Recipe.of(recipe), DEATHS[death], one_row="decoding" in death)


@pytest.mark.parametrize("place", HOOKS)
def test_a_hook_of_the_users_that_dies_leaves_nothing(place: str) -> None:
    assert_nothing_is_left(Recipe.of(DEADLY[0]), HOOKS[place])


@pytest.mark.parametrize("kind", ["encoder", "pre_projector", "projected", "sequence", "decoder"])
def test_a_method_that_dies_leaves_nothing(kind: str) -> None:
    assert_nothing_is_left(Recipe((Dies(kind), *Recipe.of(f"fastv(layer=2, keep=5) + {ROWS}").methods)), told_to_die)


def assert_nothing_is_left(recipe: Recipe, install: Callable[[Any], Callable[[], None]], one_row: bool = False) -> None:
    expected, model = after_nothing(recipe), LLAVA.model()
    with torch.no_grad(), no_collector(), attached(model, recipe) as session:
        for generating in (True,) if one_row else (False, True):
            with Live() as live:
                remove = install(model)
                died = die(model, LLAVA.inputs(ONE), generating)
                remove()
                assert live.total == 0, died
            for found, right in zip(next_calls(model, session), expected):
                assert torch.equal(found, right) if isinstance(found, Tensor) else found == right


# Nobody detaches.


@protocols
def test_a_session_that_nobody_detached_goes_with_its_model(body: Body, recipe: Recipe) -> None:
    model = body.model()
    session = attached(model, recipe, body)
    watched = [weakref.ref(model), weakref.ref(session), weakref.ref(model.get_input_embeddings().weight)]
    with ThreadPoolExecutor(1) as pool:  # which lives on
        pool.submit(generate, model, body.inputs(ONE), 2).result()
        del session
        generate(model, body.inputs(ONE), 2)
        assert watched[1]() is not None  # still at work
        del model
        gc.collect()
        assert [one() for one in watched] == [None] * 3


@protocols
def test_calls_and_sessions_leave_the_attention_functions_alone(body: Body, recipe: Recipe) -> None:
    before = dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping)
    model = body.model()
    attached(model, recipe, body)
    generate(model, body.inputs(ONE), 2)
    assert before == (dict(ALL_ATTENTION_FUNCTIONS._local_mapping), dict(ALL_ATTENTION_FUNCTIONS._global_mapping))


@pytest.mark.parametrize("recipe", ["hiprune(keep=6)", "snapkv(keep=0.5, window=4)", "prefixkv(keep=0.5, distance=-4)"])
def test_a_cache_that_is_kept_does_not_keep_its_model(recipe: str) -> None:
    model = LLAVA.model()
    with attached(model, recipe):
        kept = generate(model, LLAVA.inputs(ONE), 4).past_key_values
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert kept.get_seq_length() == LLAVA.inputs(ONE)["input_ids"].shape[1] + 3
