"""Random selection is the same on every run, and for a sample the same in every batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.methods import Random
from foveate.ops.draw import draw
from tests.methods.bodiless import images

seeds, numbers = st.integers(0, 9999), st.integers(0, 20)


@given(st.integers(1, 600), st.data(), seeds, numbers)
def test_it_draws_exactly_k_tokens_in_raster_order(count: int, data: st.DataObject, seed: int, number: int) -> None:
    k = data.draw(st.integers(1, count))
    drawn = draw(count, k, seed, number)

    assert len(drawn) == k
    assert drawn.diff().gt(0).all()
    assert 0 <= drawn[0] <= drawn[-1] < count


@given(seeds, numbers)
def test_the_same_seed_gives_the_same_draw(seed: int, number: int) -> None:
    assert torch.equal(draw(64, 16, seed, number), draw(64, 16, seed, number))


def test_seeds_and_places_give_different_draws() -> None:
    drawn = {tuple(draw(64, 16, seed, number).tolist()) for seed in range(8) for number in range(4)}

    assert len(drawn) == 32


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw(64, 16, 0, 0)

    assert torch.equal(torch.get_rng_state(), before)


def test_an_image_is_drawn_by_its_place_in_the_prompt_and_never_by_its_row() -> None:
    batch = Random().select(images(4, 4, number=(0, 1, 0, 2)), 5)
    alone = [Random().select(images(4, 4, number=(number,)), 5)[0] for number in (0, 1, 0, 2)]

    assert torch.equal(batch, torch.stack(alone))


def test_the_session_seed_decides() -> None:
    first, second = (Random().select(images(8, 8, seed=seed), 20) for seed in (0, 1))

    assert not torch.equal(first, second)


def test_every_token_is_drawn_about_equally_often() -> None:
    times = torch.stack([draw(16, 4, seed, 0) for seed in range(800)]).flatten().bincount(minlength=16)

    # 200 each, standard deviation 12.2
    assert times.min() > 140
    assert times.max() < 260


@pytest.mark.parametrize("seed", [20_260_101, 2**32 - 1])
def test_any_seed_that_torch_takes_will_do(seed: int) -> None:
    assert len(draw(64, 16, seed, 0)) == 16
