"""Scenes are reproducible, and their masks say what the pixels show."""

import numpy as np
import pytest

from foveate.tasks.scenes import COLOURS, SHAPES, draw_scene


def scenes(n: int, **settings):
    return [draw_scene(np.random.default_rng(seed), **settings) for seed in range(n)]


def test_same_seed_draws_same_scene():
    first, second = (draw_scene(np.random.default_rng(7)) for _ in range(2))
    assert np.array_equal(first.pixels, second.pixels)
    assert first.things == second.things


def test_things_do_not_overlap():
    for scene in scenes(60):
        covered = scene.masks.sum(0) + scene.sign_mask
        assert covered.max() <= 1


def test_mask_is_where_the_colour_is():
    """Inside a mask the picture is close to one of the values its colour stands for."""
    for scene in scenes(60):
        for thing, mask in zip(scene.things, scene.masks, strict=True):
            seen = np.median(scene.pixels[mask], axis=0)
            values = np.array(COLOURS[thing.colour], float)
            mixes = np.concatenate(
                [values + t * (values[[i]] - values) for i in range(len(values)) for t in np.linspace(0, 1, 9)]
            )
            assert np.abs(mixes - seen).max(1).min() < 40


def test_all_shapes_and_colours_occur():
    things = [thing for scene in scenes(200) for thing in scene.things]
    assert {thing.shape for thing in things} == set(SHAPES)
    assert {thing.colour for thing in things} == set(COLOURS)


@pytest.mark.parametrize("size", [48, 64, 96])
def test_sign_fits_any_canvas(size):
    for scene in scenes(60, size=size, sign_rate=1.0):
        assert len(scene.sign) == 3
        assert all(mask.any() for mask in scene.letter_masks)
        assert not (scene.letter_masks & ~scene.sign_mask).any()
