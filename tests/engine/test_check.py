"""Layers that a model does not have are refused by name, whichever way a method asks for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

import foveate
from foveate.core.errors import FoveateError
from foveate.core.method import Cache, Experts, Routing, Tokens
from foveate.core.signal import Columns, Function, Hidden, Signal, Site
from foveate.core.traits import Traits
from tests.suite.bodies import BODIES

LLAVA = BODIES["llava-clip"]
"""Four decoder layers; the last but one of its encoder blocks feeds the projector."""


@dataclass(frozen=True)
class Edits(Tokens):
    place: Site
    name = "edits"

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (self.place,)

    def edit(self, *args: Any) -> None:
        return None


@dataclass(frozen=True)
class Reads(Cache):
    signal: Signal
    name = "reads"

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return (self.signal,)


@dataclass(frozen=True)
class Routes(Routing):
    layer: int
    name = "routes"

    def routed(self, traits: Traits) -> tuple[int, ...]:
        return (0, self.layer)

    def plan(self, *args: Any) -> None:
        return None


@dataclass(frozen=True)
class Weighs(Experts):
    layer: int
    name = "weighs"

    def weighed(self, traits: Traits) -> tuple[int, ...]:
        return (self.layer,)

    def weigh(self, *args: Any) -> None:
        return None


@pytest.mark.parametrize(
    ("method", "reason"),
    [
        (Edits(Site("decoder", 4)), "edits: decoder layer 4: must be in 0..3"),
        (Edits(Site("decoder", -1)), "edits: decoder layer -1: must be in 0..3"),
        (Reads(Hidden(Site("decoder", 7))), "reads: decoder layer 7: must be in 0..3"),
        (Reads(Columns(Site("decoder", 4))), "reads: decoder layer 4: must be in 0..3"),
        (Reads(Function("norm", 4)), "reads: decoder layer 4: must be in 0..3"),
        (Routes(9), "routes: decoder layer 9: must be in 0..3"),
    ],
    ids=str,
)
def test_layers_beyond_the_decoder_s_depth(method: Any, reason: str) -> None:
    with pytest.raises(FoveateError) as error:
        foveate.attach(LLAVA.model(), method)
    assert str(error.value) == reason


def test_blocks_beyond_the_encoder_s_depth() -> None:
    model = LLAVA.model()
    depth, feature = len(foveate.models.anatomy(model).encoder.blocks), foveate.models.anatomy(model).encoder.feature_layer
    assert feature == depth - 2

    foveate.attach(model, Reads(Columns(Site("encoder", depth - 1)))).detach()
    with pytest.raises(FoveateError, match=rf"reads: encoder block {depth}: must be in 0\.\.{depth - 1}"):
        foveate.attach(model, Reads(Columns(Site("encoder", depth))))
    foveate.attach(model, Edits(Site("encoder", feature, "after"))).detach()
    with pytest.raises(FoveateError, match=rf"edits: encoder block as a site {depth - 1}: must be in 0\.\.{feature}"):
        foveate.attach(model, Edits(Site("encoder", depth - 1)))


def test_experts_of_layers_beyond_the_depth() -> None:
    with pytest.raises(FoveateError, match=r"weighs: decoder layer 40: must be in 0\.\.4"):
        foveate.attach(BODIES["qwen3_vl_moe"].model(), Weighs(40))
