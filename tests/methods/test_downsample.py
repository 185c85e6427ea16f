"""Downsampling: the card's rule, and that pictures really come by it, on checkpoints laid out as on the Hub."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from foveate import FoveateError, Recipe, checkpoint
from foveate.bench.folder import Settings
from foveate.bench.measure import Bench
from foveate.checkpoint import Checkpoint
from foveate.methods import Downsample
from tests.hub import write_checkpoint

PICTURE = Image.linear_gradient("L").resize((256, 192)).convert("RGB")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    """A tiny checkpoint of a family."""
    known: dict[str, Checkpoint] = {}

    def load(family: str) -> Checkpoint:
        if family not in known:
            folder: Path = tmp_path_factory.mktemp(family)
            known[family] = checkpoint.load(str(write_checkpoint(family, folder)), "cpu", "float32")
        return known[family]

    return load


def cells(size: tuple[int, int], side: int = 10) -> int:
    """Tokens of a model that makes one of each square of ``side`` pixels, those that are cut off at the border too."""
    return -(-size[0] // side) * -(-size[1] // side)


def test_sides_are_scaled_by_the_root_of_the_share() -> None:
    assert Downsample(most=0.25).resize((400, 200), cells) == (200, 100)
    assert Downsample(most=200).resize((400, 200), cells) == (200, 100)
    assert Downsample(most=1.0).resize((400, 200), cells) == (400, 200)


def test_what_rounds_to_too_many_tokens_is_made_smaller_still() -> None:
    smaller = Downsample(most=0.3).resize((95, 95), cells)
    assert cells(smaller) <= 0.3 * cells((95, 95)) < cells((smaller[0] + 6, smaller[1] + 6))


def test_a_model_that_cannot_go_as_low_is_named_with_the_remedy() -> None:
    with pytest.raises(FoveateError, match=r"most=0.3: allows 24 of the 80 tokens .* makes 40 or more .* use pool"):
        Downsample(most=0.3).resize((100, 80), lambda size: max(cells(size), 40))


@pytest.mark.parametrize(("family", "whole"), [("qwen2_5_vl", 54), ("internvl", 20), ("llava_next", None)])
def test_the_models_own_grid_has_no_more_tokens(family: str, whole: int | None, loaded: Callable[[str], Checkpoint]) -> None:
    model, most = loaded(family), 0.7 if family == "llava_next" else 0.5
    reports = []
    for recipe in ("none", f"downsample(most={most})"):
        with model.attach(recipe) as session:
            model.answer(model.inputs([[PICTURE]], ["what is it?"], session), 2)
        reports.append(session.report)

    plain, small = reports
    assert whole in (None, plain.original_visual_tokens)
    assert 0 < small.original_visual_tokens <= most * plain.original_visual_tokens
    assert small.idle == ()


@pytest.mark.parametrize("family", ["llava", "gemma3"])
def test_fixed_grids_are_refused_with_the_remedy(family: str, loaded: Callable[[str], Checkpoint]) -> None:
    with pytest.raises(FoveateError, match=r"downsample: \w+ makes the same grid of every picture, [^\n]*use pool$"):
        loaded(family).attach("downsample")


def test_pictures_that_did_not_come_by_it_are_refused(loaded: Callable[[str], Checkpoint]) -> None:
    model = loaded("qwen2_5_vl")
    inputs = model.inputs([[PICTURE]], ["what is it?"])
    with (
        model.attach("downsample(most=0.5)"),
        pytest.raises(FoveateError, match=r"downsample: acts on pictures before the processor, [^\n]*session\.pictures\("),
    ):
        model.answer(inputs, 2)


def test_who_changes_nothing_is_named(loaded: Callable[[str], Checkpoint]) -> None:
    model = loaded("qwen2_5_vl")
    with model.attach("downsample(most=1000)") as session:
        assert session.pictures([PICTURE], model.processor)[0] is PICTURE
        model.answer(model.inputs([[PICTURE]], ["what is it?"], session), 2)
    assert session.report.idle == ("downsample(most=1000)",)


def test_other_methods_get_the_smaller_grid(loaded: Callable[[str], Checkpoint]) -> None:
    model = loaded("qwen2_5_vl")
    with model.attach("downsample(most=0.5) + uniform(keep=0.5)") as session:
        model.answer(model.inputs([[PICTURE]], ["what is it?"], session), 2)
    assert session.report.original_visual_tokens <= 27
    assert session.report.visual_tokens[-1] == session.report.original_visual_tokens / 2


def test_palettes_are_made_colours_first(loaded: Callable[[str], Checkpoint]) -> None:
    model = loaded("qwen2_5_vl")
    with model.attach("downsample(most=0.5)") as session:
        (small,) = session.pictures([PICTURE.convert("P")], model.processor)
    assert small.mode == "RGB"
    assert small.width < PICTURE.width


def test_a_bench_finds_out_before_it_starts_how_small_pictures_can_be(loaded: Callable[[str], Checkpoint]) -> None:
    settings = Settings("tiny", 1, 0, "cpu", "float32", 1)
    bench = Bench(loaded("qwen2_5_vl"), settings, [PICTURE])

    low, fine = bench.refusals([Recipe.of("downsample(most=0.05)"), Recipe.of("downsample(most=0.5)")])

    assert "use pool" in str(low)
    assert fine is None
