"""What models share with methods: shares of the depth, and refusals in one line."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.methods.bodiless import traits


@given(st.lists(st.integers(1, 31), min_size=1, max_size=5, unique=True).map(sorted))
def test_a_model_as_deep_as_the_papers_has_its_layers(layers: list[int]) -> None:
    assert traits().same_depth(layers, of=32) == tuple(layers)


@given(st.lists(st.integers(1, 31), min_size=1, max_size=5, unique=True).map(sorted), st.integers(1, 80))
def test_layers_of_other_depths_ascend_from_one(layers: list[int], depth: int) -> None:
    found = traits(decoder_layers=depth).same_depth(layers, of=32)

    assert len(found) == len(layers)
    assert all(low < high for low, high in zip((0, *found), found))


def test_layers_of_half_the_depth() -> None:
    assert traits(decoder_layers=16).same_depth((8, 16), of=32) == (4, 8)


def test_a_layer_that_is_not_there_is_refused() -> None:
    assert traits().refuse_layers("layers", (1, 32)) == "layers=(1, 32): must be in 1..31"
    assert traits().refuse_layers("layers", (0,)) == "layers=(0,): must be in 1..31"
    assert traits().refuse_layers("layers", (1, 31)) is None


def test_attention_of_a_recurrent_layer_is_refused() -> None:
    hybrid = traits(recurrent=(0, 1, 2, 4))

    assert hybrid.refuse_layers("layers", (4,), attention=(3,)) is None
    refusal = hybrid.refuse_layers("layers", (2, 3), attention=(1, 2))
    assert refusal == "layers=(2, 3): reads the attention of layers [1, 2], which are recurrent; choose others"
