"""Side data: from the caller's hand to the methods, by picture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.recipe import Recipe
from foveate.core.signal import Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.session import Session, attach
from foveate.methods import FastV
from tests.suite.bodies import BODIES, ONE, RAGGED

SITES = (Site("patches"), Site("encoder", 1), Site("pre_projector"), Site("projected"), Site("sequence"), Site("decoder", 2))
READ: dict[str, list[Any]] = {}


@dataclass(frozen=True)
class Reader(Tokens):
    """Notes what it is given."""

    name = "reader"
    title = "Reader"
    group = "test"
    paper = "none"

    needed: bool = True

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return tuple(site for site in SITES if site.kind in (*traits.vision_sites, "sequence", "decoder"))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return (Side("depth", self.needed),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        items = [(sample, number) for sample, grids in enumerate(layout.items) for number in range(len(grids))]
        READ.setdefault(str(site), []).extend(seen[Side("depth", self.needed)].of(items))
        return None


@pytest.fixture(autouse=True)
def _fresh() -> None:
    READ.clear()


def read(site: str) -> list[int | None]:
    return [None if value is None else int(value) for value in READ[site]]


@pytest.mark.parametrize("body", [BODIES["llava-clip"], BODIES["qwen2_5_vl"]], ids=["llava-clip", "qwen2_5_vl"])
def test_every_site_gets_the_value_of_each_picture(body: Any) -> None:
    model = body.model()
    with attach(model, Recipe((Reader(),))) as session, session.side(images={"depth": [10, 11, 12, 13]}), torch.no_grad():
        model(**body.inputs(RAGGED))
    for site in READ:
        assert read(site) == [10, 11, 12, 13], site
    assert {"patches", "projected", "sequence", "decoder[2]"} <= set(READ)


def test_all_views_of_a_picture_get_its_value() -> None:
    body = BODIES["llava_next"]
    model = body.model()
    with attach(model, Recipe((Reader(),))) as session, session.side(images={"depth": [10, 11, 12, 13]}), torch.no_grad():
        model(**body.inputs(RAGGED))
    assert read("sequence") == [10, 10, 11, 11, 12, 12, 13, 13]


def test_a_single_value_is_for_all_pictures() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with attach(model, Recipe((Reader(),))) as session, session.side(images={"depth": 5}), torch.no_grad():
        model(**body.inputs(RAGGED))
    assert read("sequence") == [5] * 4


def test_arrays_come_as_tensors() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with attach(model, Recipe((Reader(),))) as session, session.side(images={"depth": [np.array([5.0])]}), torch.no_grad():
        model(**body.inputs(ONE))
    assert isinstance(READ["sequence"][0], Tensor)


def test_generate_reads_it_and_decoding_does_not_ask_again() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with attach(model, Recipe((Reader(),))) as session, session.side(images={"depth": [5]}):
        model.generate(**body.inputs(ONE), max_new_tokens=3, do_sample=False)
    assert read("sequence") == [5]


def test_what_was_encoded_earlier_keeps_its_side_data() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with attach(model, Recipe((Reader(),))) as session, torch.no_grad():
        with session.side(images={"depth": [5]}):
            encoded = session.encode(**inputs)
        model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], **encoded)
    assert read("sequence") == [5]


def test_blocks_within_blocks_add_up_and_end() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with attach(model, Recipe((Reader(needed=False),))) as session, torch.no_grad():
        with session.side(images={"depth": [5]}):
            with session.side(images={"depth": [6]}):
                model(**inputs)
            model(**inputs)
        model(**inputs)
    assert read("sequence") == [6, 5, None]


def test_another_thread_hands_over_its_own() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with attach(model, Recipe((Reader(needed=False),))) as session, session.side(images={"depth": [5]}):
        thread = Thread(target=torch.no_grad()(lambda: model(**inputs)))
        thread.start()
        thread.join()
    assert read("sequence") == [None]


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        ({}, r"reader: needs side data 'depth' of every image; call .*session.side\(images="),
        ({"images": {"depth": [None]}}, "needs side data 'depth' of every image"),
        ({"images": {"depth": [1, 2]}}, "images: side data 'depth' has 2 values for 1 images; give one for each"),
        ({"images": {"deep": [1]}}, "images: .* reads no side data 'deep'; it reads depth"),
        ({"pictures": {"depth": [1]}}, "pictures: .*write images="),
    ],
)
def test_what_is_missing_or_misspelt_is_refused_before_the_encoder_runs(kinds: dict[str, Any], words: str) -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    model.model.vision_tower.register_forward_pre_hook(_never)

    def call(session: Session) -> None:
        with session.side(**kinds), torch.no_grad():
            model(**body.inputs(ONE))

    with attach(model, Recipe((Reader(),))) as session, pytest.raises(FoveateError, match=words):
        call(session)


def test_recipes_that_read_none_ignore_it() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with attach(model, FastV()) as session, torch.no_grad():
        plain = model(**inputs).logits
        with session.side(images={"depth": [1]}):
            assert torch.equal(model(**inputs).logits, plain)


_never: Callable[..., None] = lambda *_: pytest.fail("the encoder ran")  # noqa: E731
