"""What stands behind the placeholders, held against the features that the models really make."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from foveate.models import anatomy
from foveate.models.anatomy import Anatomy, Picture, View
from foveate.models.llava_next import tiles
from tests import tiny
from tests.suite.bodies import BODIES, ONEVISION, RAGGED


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def shown(body: str, *sizes: tuple[int, int]) -> dict[str, Any]:
    """The feature call's arguments for images of some sizes."""
    return double(BODIES[body].images(sizes, torch.Generator().manual_seed(1)))


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def with_empty_tiles() -> dict[str, Any]:
    """Two samples of three tiles and one, the second padded with empty ones."""
    pixels = noise(2, 3, 3, 64, 64)
    pixels[1, 1:] = 0
    return {"pixel_values": pixels, "pixel_attention_mask": torch.ones(2, 3, 64, 64)}


@dataclass(frozen=True)
class Case:
    """A call of a model's feature function."""

    name: str
    build: Callable[[], Any]
    kwargs: dict[str, Any]
    views: list[list[tuple[int, int]]]
    """Grids of each picture."""
    group: list[list[int]] = field(default_factory=list)
    """Cells of a token in each of them, where it is not one."""

    @property
    def call(self) -> str:
        return "get_video_features" if "pixel_values_videos" in self.kwargs else "get_image_features"

    def open(self) -> tuple[Anatomy, list[Picture]]:
        parts = anatomy(self.build().double())
        bound = inspect.signature(getattr(parts.multimodal, self.call)).bind(**self.kwargs)
        bound.apply_defaults()
        return parts, parts.pictures(bound.arguments)

    def features(self, parts: Anatomy) -> Tensor:
        """``[T, D]`` all rows in the order of the placeholders."""
        made = getattr(parts.multimodal, self.call)(**self.kwargs, return_dict=True).pooler_output
        return torch.cat([rows.reshape(-1, rows.shape[-1]) for rows in made])


BASE = (4, 4)
CASES = [
    Case(
        "llava_next",
        tiny.llava_next,
        shown("llava_next", (20, 64), (40, 64), (64, 20), (64, 64)),
        [[BASE, (2, 8)], [BASE, (6, 8)], [BASE, (8, 2)], [BASE, (8, 8)]],
    ),
    Case("llava_next-thin", tiny.llava_next, shown("llava_next", (1, 64), (64, 1)), [[BASE], [BASE]]),
    Case("llava_onevision-thin", tiny.llava_onevision, shown("llava_onevision", (1, 64), (64, 1)), [[BASE], [BASE]]),
    Case("llava_next-mistral", lambda: tiny.llava_next(text="mistral"), shown("llava_next", (40, 64)), [[BASE, (6, 8)]]),
    Case(
        "llava_onevision",
        tiny.llava_onevision,
        shown("llava_onevision", (20, 64), (40, 64), (64, 64)),
        [[BASE, (2, 8)], [BASE, (4, 6)], [BASE, (5, 5)]],
        [[1, 1], [1, 4], [1, 4]],
    ),
    Case(
        "llava_onevision-aspect",
        tiny.llava_onevision,
        {**shown("llava_onevision", (64, 64)), "vision_aspect_ratio": "anyres_max_9"},
        [[BASE, (8, 8)]],
    ),
    Case(
        "llava_onevision-several",
        tiny.llava_onevision,
        {**shown("llava_onevision", (40, 64), (64, 20), (20, 64)), "batch_num_images": torch.tensor([2, 1])},
        [[BASE], [BASE], [BASE, (2, 8)]],
    ),
    Case(
        "llava_onevision-video",
        tiny.llava_onevision,
        {"pixel_values_videos": noise(2, 3, 3, 32, 32)},
        [[(6, 2)]] * 2,
        [[4]] * 2,
    ),
    Case(
        "llava_onevision-odd-video",
        lambda: tiny.llava_onevision(grid=5),
        {"pixel_values_videos": noise(1, 2, 3, 40, 40)},
        [[(6, 3)]],
        [[4]],
    ),
    Case("internvl", tiny.internvl, shown("internvl", (64, 128), (64, 64)), [[BASE]] * 3, [[4]] * 3),
    Case("internvl-larger", tiny.internvl, {"pixel_values": noise(1, 3, 96, 96)}, [[(6, 6)]], [[4]]),
    Case("idefics3", tiny.idefics3, with_empty_tiles(), [[BASE]] * 4, [[4]] * 4),
    Case("smolvlm", tiny.smolvlm, with_empty_tiles(), [[BASE]] * 4, [[16]] * 4),
    Case("smolvlm-empty", tiny.smolvlm, {"pixel_values": torch.zeros(1, 2, 3, 64, 64).double()}, [[BASE]], [[16]]),
]

SHAPED = {"llava_next": cache(tiny.llava_next), "llava_onevision": cache(tiny.llava_onevision)}

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
def test_there_are_as_many_placeholders_as_rows(case: Case) -> None:
    parts, pictures = case.open()
    assert [[(view.rows, view.columns) for view in picture.views] for picture in pictures] == case.views
    assert sum(len(picture.placement) for picture in pictures) == len(case.features(parts))


@every_case
def test_each_token_of_each_view_has_one_placeholder_in_raster_order(case: Case) -> None:
    for picture in case.open()[1]:
        placement = picture.placement
        for number, view in enumerate(picture.views):
            assert placement[placement[:, 0] == number, 1].tolist() == list(range(view.rows * view.columns))
        assert set(placement[:, 0].tolist()) <= {-1, *range(len(picture.views))}
        assert ((placement[:, 0] < 0) == (placement[:, 1] < 0)).all()


@every_case
def test_newlines_are_where_the_picture_says(case: Case) -> None:
    parts, pictures = case.open()
    claimed = torch.cat([picture.placement[:, 0] < 0 for picture in pictures])
    newline = getattr(parts.multimodal, "image_newline", None)
    rows = case.features(parts)
    found = torch.zeros(len(rows), dtype=torch.bool) if newline is None else (rows == newline).all(1)
    assert claimed.tolist() == found.tolist()


@every_case
def test_a_token_depends_on_the_cells_it_claims_and_on_no_others(case: Case) -> None:
    parts, pictures = case.open()
    encoder = parts.encoder
    slope = influence(case, parts, lambda leaf: after(encoder.blocks[encoder.feature_layer], leaf))
    found = slope[:, :, encoder.prefix :].flatten(1)
    assert [row.nonzero()[:, 0].tolist() for row in found] == claims(pictures)
    assert not slope[:, :, : encoder.prefix].any()
    groups = [[view.cells.shape[1] for view in picture.views] for picture in pictures]
    assert groups == (case.group or [[1] * len(views) for views in case.views])


@every_case
def test_the_projector_is_fed_tokens_or_cells_as_declared(case: Case) -> None:
    parts, pictures = case.open()
    slope = influence(case, parts, lambda leaf: before(parts.encoder.projector, leaf)).flatten(1)
    assert [row.nonzero()[:, 0].tolist() for row in slope] == claims(pictures, parts.encoder.fed)


@every_case
def test_rows_go_before_the_projector_only_where_no_token_mixes_them(case: Case) -> None:
    parts, pictures = case.open()
    mixed = any(view.cells.shape[1] > 1 for picture in pictures for view in picture.views)
    sites = parts.traits().vision_sites
    assert "projected" in sites
    assert not (mixed and sites & {"patches", "encoder", "middle"})
    assert not (mixed and not parts.encoder.shuffled and "pre_projector" in sites)


def claims(pictures: list[Picture], cells: Callable[[View], Tensor] = lambda view: view.cells) -> list[list[int]]:
    """Cells of each placeholder."""
    return [
        sorted(set(cells(picture.views[number])[ordinal].tolist())) if number >= 0 else []
        for picture in pictures
        for number, ordinal in picture.placement.tolist()
    ]


def after(module: nn.Module, leaf: list[Tensor]) -> Any:
    """Cuts the graph behind a module; what it makes becomes the leaf."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        leaf.append(output.detach().requires_grad_())
        return leaf[0]

    return module.register_forward_hook(hook, prepend=True)


def before(module: nn.Module, leaf: list[Tensor]) -> Any:
    """Cuts the graph before a module; what it is fed becomes the leaf."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        leaf.append(args[0].detach().requires_grad_())
        return (leaf[0],)

    return module.register_forward_pre_hook(hook, prepend=True)


def influence(case: Case, parts: Anatomy, cut: Callable[[list[Tensor]], Any]) -> Tensor:
    """``[T, tiles, n]`` whether each row of the features depends on each row at the cut."""
    leaf: list[Tensor] = []
    handle = cut(leaf)
    rows = case.features(parts)
    handle.remove()
    weights = noise(rows.shape[1])
    slopes = []
    for row in rows:
        slope = torch.autograd.grad((row * weights).sum(), leaf[0], retain_graph=True, allow_unused=True)[0]
        slopes.append(torch.zeros_like(leaf[0]) if slope is None else slope)
    size = torch.stack(slopes).abs().sum(-1)
    return size > 1e-9 * size.amax()


def test_the_border_of_a_wide_picture_is_cut_off_by_hand_example() -> None:
    # 40 x 64 pixels in 2 x 2 tiles of 4 x 4 cells: of 8 lines 5 show the picture, so one is cut off above and below.
    _, (picture,) = Case("", tiny.llava_next, shown("llava_next", (40, 64)), []).open()
    overview, details = picture.views
    assert overview.cells[:, 0].tolist() == list(range(16))
    # Tiles follow the overview; the first line left is line 1 of the tiles 1 and 2, the last one line 2 of tiles 3 and 4.
    assert details.cells[:8, 0].tolist() == [20, 21, 22, 23, 36, 37, 38, 39]
    assert details.cells[-8:, 0].tolist() == [56, 57, 58, 59, 72, 73, 74, 75]
    assert picture.tokens[16 : 16 + 9].tolist() == [*([1, column] for column in range(8)), [-1, -1]]
    assert len(picture.tokens) == 16 + 6 * 9


def test_the_borders_of_a_tall_picture_are_left_and_right() -> None:
    _, (picture,) = Case("", tiny.llava_next, shown("llava_next", (64, 20)), []).open()
    assert picture.views[1].cells[:4, 0].tolist() == [17, 18, 21, 22]
    assert [place for place, row in enumerate(picture.tokens.tolist()) if row == [-1, -1]] == list(range(18, 40, 3))


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(["llava_next", "llava_onevision"]),
    sizes=st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=1, max_size=3),
)
def test_pictures_of_every_shape_have_the_rows_that_the_model_makes(name: str, sizes: list[tuple[int, int]]) -> None:
    parts = anatomy(SHAPED[name]())
    counts = [1 + rows * columns for rows, columns in (tiles(parts.model.config, size) for size in sizes)]
    shape = {"image_sizes": torch.tensor(sizes), "pixel_values": torch.randn(len(sizes), max(counts), 3, 32, 32)}

    made = parts.multimodal.get_image_features(**shape, return_dict=True).pooler_output

    pictures = parts.pictures(shape)
    assert [picture.count for picture in pictures] == [len(rows) for rows in made]
    for picture in pictures:
        assert [len(slots) for slots in picture.slots] == [view.rows * view.columns for view in picture.views]


def test_pooled_frames_are_two_by_two_cells_and_lie_one_below_the_other() -> None:
    case = next(case for case in CASES if case.name == "llava_onevision-video")
    _, (first, second) = case.open()
    (view,) = first.views
    assert view.frames == 3
    assert view.cells[:4].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(view.cells[4:8], view.cells[:4] + 16)
    assert torch.equal(second.views[0].cells, view.cells + 48)
    assert first.tokens[-1].tolist() == [-1, -1]
    assert (first.tokens[:-1] >= 0).all()


def test_pixel_shuffle_joins_neighbours() -> None:
    _, pictures = Case("", tiny.internvl, shown("internvl", (64, 128)), []).open()
    assert pictures[0].views[0].cells[:2].tolist() == [[0, 1, 8, 9], [2, 3, 10, 11]]
    assert pictures[1].views[0].cells[0].tolist() == [64, 65, 72, 73]


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision", "internvl", "idefics3", "smolvlm"])
def test_prompts_have_the_placeholders_that_the_model_wants(name: str) -> None:
    body = BODIES[name]
    model = body.model().double()
    sizes = list(ONEVISION) if name.startswith("llava") else [(64, 128), (64, 64)]
    samples = [*RAGGED, (5, 0, 4)]
    with torch.no_grad():
        for several in ([], sizes):
            batch = model(**double(body.inputs(samples, sizes=several))).logits
            for place in range(len(samples)):
                alone = model(**double(body.inputs(samples, sizes=several, only=place))).logits[0]
                torch.testing.assert_close(batch[place, -len(alone) :], alone, rtol=1e-6, atol=1e-6)
    assert body.tokens == sum(body.views)


TEXT = {
    "llama": tiny.llava_next,
    "mistral": lambda: tiny.llava_next(text="mistral"),
    "qwen2": tiny.llava_onevision,
    "qwen3": lambda: tiny.internvl(text="qwen3"),
    "idefics3": tiny.idefics3,
    "smolvlm": tiny.smolvlm,
}


@pytest.mark.parametrize("text", list(TEXT))
def test_queries_keys_and_values_are_those_that_enter_attention(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model = TEXT[text]().double()
    parts, layer = anatomy(model), 2
    entered: dict[str, Any] = {}
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def spy(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if module is parts.attention(layer):
            entered.update(query=query, key=key, value=value)
        return kernel(module, query, key, value, *args, **kwargs)

    def inputs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered.update(x=args[0], rope=kwargs["position_embeddings"])

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._local_mapping, "sdpa", spy)
    handle = parts.layers[layer].register_forward_pre_hook(inputs, with_kwargs=True)
    ids = torch.randint(11, tiny.VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        handle.remove()
        rope = parts.rotary(layer, entered["x"], positions[None])
        query, key = parts.query_key(layer, entered["x"], rope)
        again, value = parts.keys_values(layer, entered["x"], rope)
        plain = parts.query_key(layer, entered["x"], None)
    for mine, theirs in zip(rope, entered["rope"]):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(query, entered["query"])
    torch.testing.assert_close(key, entered["key"])
    torch.testing.assert_close(again, entered["key"])
    torch.testing.assert_close(value, entered["value"])
    assert not torch.allclose(plain[1], key)
    # One axis; heads of 12 numbers turn by 6 frequencies.
    assert parts.rotary_rows == 1
    assert parts.rotary_axes == (6,)
    assert parts.traits().sliding == ()


def test_mistral_with_a_window_slides_in_every_layer() -> None:
    model = tiny.llava_next(text="mistral")
    model.config.text_config.sliding_window = 8
    assert anatomy(model).traits().sliding == (0, 1, 2, 3)


@pytest.mark.parametrize("build", [tiny.llava, tiny.llava_next, tiny.llava_onevision, tiny.internvl])
def test_the_halves_make_the_block(build: Callable[..., Any]) -> None:
    encoder = anatomy(build().double()).encoder
    x = noise(2, 17, 32)
    for block in encoder.blocks:
        parts = encoder.halves(block)
        with torch.no_grad():
            attended = parts.attention(parts.norm1(x))[0]
            middle = x + (attended if parts.scale1 is None else parts.scale1 * attended)
            mixed = parts.mlp(parts.norm2(middle))
            out = middle + (mixed if parts.scale2 is None else parts.scale2 * mixed)
            whole = block(x) if parts.scale1 is not None else block(x, attention_mask=None)
        torch.testing.assert_close(out, whole)


def test_patches_leave_out_the_pixels_that_the_encoder_leaves_out() -> None:
    # 36 pixels in patches of 8: four patches and a rest, as in SigLIP's 384 pixels in patches of 14.
    patches = anatomy(tiny.llava()).encoder.patches
    pixels = noise(2, 3, 36, 36)
    cells = patches.read((pixels,), {})
    assert cells.shape == (32, 3, 8, 8)
    assert torch.equal(cells[16 + 5], pixels[1, :, 8:16, 8:16])


def test_an_unknown_family_is_refused_by_naming_the_supported_ones() -> None:
    from foveate.core.errors import FoveateError

    known = (
        "llava, gemma3, qwen3_vl, llava_next, llava_onevision, internvl, idefics3, smolvlm, qwen2_vl, qwen2_5_vl, qwen3_5, "
        "qwen3_vl_moe, qwen2_5_omni_thinker(, several)?, text"
    )
    with pytest.raises(FoveateError, match=f"model 'Linear': not supported; supported families: {known}"):
        anatomy(nn.Linear(2, 2))
