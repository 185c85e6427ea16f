"""Anatomies of the Qwen families against what their own code does, on tiny random models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from foveate.core.errors import FoveateError
from foveate.models import Anatomy, anatomy
from foveate.models.qwen_vision import boundaries
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED

FAMILIES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")
TWO = [[1, 6, 10], [1, 12, 4]]
"""Frames, rows and columns of patches: 3x5 and 6x2 tokens, no multiple of the windows of 2x2 tokens."""
VIDEO = [[3, 4, 6], [2, 6, 4]]
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.fixture(params=FAMILIES)
def parts(request: pytest.FixtureRequest) -> Anatomy:
    return anatomy(BODIES[request.param].model())


@pytest.fixture(params=[("image", TWO), ("video", VIDEO)], ids=["two images", "two videos"])
def bound(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Arguments of the feature call."""
    kind, grid = request.param
    thw = torch.tensor(grid)
    pixels = torch.randn(int(thw.prod(1).sum()), 48, generator=torch.Generator().manual_seed(1))
    return {{"image": "pixel_values", "video": "pixel_values_videos"}[kind]: pixels, f"{kind}_grid_thw": thw}


def features(parts: Anatomy, bound: dict[str, Tensor]) -> list[Tensor]:
    """Tokens of each image or video, as the language model gets them."""
    call = "get_image_features" if "pixel_values" in bound else "get_video_features"
    with torch.no_grad():
        return list(getattr(parts.multimodal, call)(**bound, return_dict=True).pooler_output)


def tower_call(bound: dict[str, Tensor]) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """Arguments of the vision tower, as the feature call passes them."""
    pixels, grid = bound.values()
    return (pixels,), {"grid_thw": grid}


def encode(parts: Anatomy, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """What the tower makes of a call: its tokens, then DeepStack features where there are any."""
    with torch.no_grad():
        output = parts.vision(*args, **kwargs, return_dict=True)
    return [output.pooler_output, *(getattr(output, "deepstack_features", None) or [])]


def cells_of(parts: Anatomy, bound: dict[str, Tensor]) -> Tensor:
    """``[N, 4]`` patches of each token of all images or videos."""
    return torch.cat([view.cells for picture in parts.pictures(bound) for view in picture.views])


@contextmanager
def attention_as(wrapper: Callable[..., Any]) -> Iterator[None]:
    """Every attention call goes to ``wrapper(original, module, query, key, value, mask, **options)``."""
    original = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def call(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any) -> Any:
        return wrapper(original, module, query, key, value, attention_mask, **options)

    ALL_ATTENTION_FUNCTIONS["sdpa"] = call
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]


@contextmanager
def hooked(module: Any, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def some_of(count: int, seed: int = 0) -> Tensor:
    """Half the cells, ascending."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[: count // 2].sort().values


def test_every_token_of_the_language_model_has_its_patches(parts: Anatomy, bound: dict[str, Tensor]) -> None:
    pictures, made = parts.pictures(bound), features(parts, bound)

    assert [len(picture.placement) for picture in pictures] == [len(tokens) for tokens in made]
    assert torch.equal(cells_of(parts, bound).flatten().sort().values, torch.arange(len(next(iter(bound.values())))))


def test_the_grid_is_that_of_tokens_with_frames_one_below_the_other(parts: Anatomy) -> None:
    (first,), (second,) = (picture.views for picture in parts.pictures({"image_grid_thw": torch.tensor(TWO)}))
    assert (first.rows, first.columns, first.frames, second.rows, second.columns) == (3, 5, 1, 6, 2)

    (video,) = parts.pictures({"image_grid_thw": None, "video_grid_thw": torch.tensor(VIDEO)})[0].views
    assert (video.rows, video.columns, video.frames) == (6, 3, 3)


def test_a_token_is_made_of_its_cells(parts: Anatomy, bound: dict[str, Tensor]) -> None:
    cells, plain, encoder = cells_of(parts, bound), torch.cat(features(parts, bound)), parts.encoder
    order = encoder.order(bound, encoder.feature_layer)
    for token in (0, 7, len(cells) - 1):
        marked = torch.isin(torch.arange(cells.numel()) if order is None else order, cells[token])
        with hooked(encoder.projector, lambda module, args, marked=marked: (args[0] + marked[:, None] * args[0].flip(1),)):
            changed = torch.cat(features(parts, bound))
        assert (changed != plain).any(1).nonzero().flatten().tolist() == [token]


def test_every_block_works_in_the_order_named(parts: Anatomy, bound: dict[str, Tensor]) -> None:
    patches = (0, 9, len(next(iter(bound.values()))) - 1)
    entered: list[Tensor] = []
    with hooked(parts.encoder.blocks[0], lambda module, args: entered.append(args[0])):
        features(parts, bound)
        for patch in patches:
            other = {name: value.clone() for name, value in bound.items()}
            next(iter(other.values()))[patch] += 1
            features(parts, other)
    order = parts.encoder.order(bound, 0)
    plain, *others = entered
    for patch, changed in zip(patches, others, strict=True):
        row = (changed != plain).any(1).nonzero().flatten()
        assert (row if order is None else order[row]).tolist() == [patch]


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_are_read_as_they_lie_in_the_image(family: str) -> None:
    parts = anatomy(BODIES[family].model(temporal=2))
    processor = Qwen2VLImageProcessorPil(
        patch_size=4, temporal_patch_size=2, merge_size=2, do_resize=False, do_rescale=False, do_normalize=False
    )
    images = [torch.rand(3, 24, 40), torch.rand(3, 48, 16)]
    made = processor([image.numpy() for image in images], return_tensors="pt", input_data_format="channels_first")
    assert made["image_grid_thw"].tolist() == TWO

    read = parts.encoder.patches.read((made["pixel_values"],), {"grid_thw": made["image_grid_thw"]})

    tiles = [image.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(-1, 3, 8, 8) for image in images]
    assert torch.equal(read, torch.cat(tiles))
    assert read.shape[1:] == parts.encoder.patches.cell


def test_of_the_frames_in_a_patch_the_first_is_read() -> None:
    parts = anatomy(tiny.qwen2_5_vl(temporal=2))
    pixels = torch.randn(16, 3, 2, 4, 4)
    later = pixels.clone()
    later[:, :, 1] += 1
    read = parts.encoder.patches.read

    assert torch.equal(read((pixels.reshape(16, -1),), {}), read((), {"hidden_states": later.reshape(16, -1)}))


def test_keeping_all_cells_changes_nothing(parts: Anatomy, bound: dict[str, Tensor]) -> None:
    args, kwargs = tower_call(bound)
    plain = encode(parts, args, kwargs)

    kept = encode(parts, *parts.encoder.patches.keep(args, kwargs, torch.arange(len(plain[0]))))

    assert all(torch.equal(one, other) for one, other in zip(plain, kept, strict=True))


@pytest.mark.parametrize("which", ["half", "one image only", "one cell"])
def test_kept_cells_see_each_other_as_if_the_rest_were_masked(parts: Anatomy, bound: dict[str, Tensor], which: str) -> None:
    args, kwargs = tower_call(bound)
    count = len(args[0]) // 4
    first = int(kwargs["grid_thw"][0].prod()) // 4
    cells = {"half": some_of(count), "one image only": torch.arange(first, count, 2), "one cell": torch.tensor([first + 1])}[
        which
    ]
    alive = torch.isin(torch.arange(len(args[0])), (cells[:, None] * 4 + torch.arange(4)).flatten())
    start: dict[Any, int] = {}

    def masked(original: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        layer = parts.encoder.attention.index(module)
        order = parts.encoder.order(bound, layer)
        # The calls of one layer, joined in order, are its rows.
        begin = start.get(module, 0)
        start[module] = begin + query.shape[2]
        keys = (alive if order is None else alive[order])[begin : start[module]]
        closed = keys[None, None, None].expand(1, 1, query.shape[2], -1) if keys.any() else None
        return original(module, query, key, value, closed, **options)

    with attention_as(masked):
        expected = encode(parts, args, kwargs)
    assert set(start.values()) == {len(args[0])}

    kept = encode(parts, *parts.encoder.patches.keep(args, kwargs, cells))

    for one, other in zip(kept, expected, strict=True):
        torch.testing.assert_close(one, other[cells], **CLOSE)


def test_where_cells_were_matters(parts: Anatomy, bound: dict[str, Tensor]) -> None:
    """A kept cell is not encoded as it would be at the place of the one before it."""
    args, kwargs = tower_call(bound)
    pixels = args[0].clone()
    pixels[:4] = pixels[4:8]
    keep = parts.encoder.patches.keep
    here = encode(parts, *keep((pixels,), kwargs, torch.tensor([1, 4])))[0]
    there = encode(parts, *keep((pixels,), kwargs, torch.tensor([0, 4])))[0]

    assert not torch.allclose(here, there, **CLOSE)


def test_what_the_caller_precomputed_is_used() -> None:
    parts = anatomy(BODIES["qwen2_vl"].model())
    grid, cells = torch.tensor(TWO), some_of(27)
    given = dict(
        hidden_states=torch.randn(108, 48),
        grid_thw=grid,
        position_ids=torch.randint(0, 9, (108, 2)),
        cu_seqlens=torch.tensor([0, 40, 108], dtype=torch.int32),
        max_seqlen=68,
    )

    args, kwargs = parts.encoder.patches.keep((), given, cells)

    assert not args
    assert torch.equal(kwargs["position_ids"].reshape(-1, 4, 2), given["position_ids"].reshape(-1, 4, 2)[cells])
    assert kwargs["cu_seqlens"].tolist() == [0, 4 * int((cells < 10).sum()), 4 * len(cells)]
    assert "max_seqlen" not in kwargs
    assert "max_seqlen" in given


def test_windows_without_a_kept_cell_vanish() -> None:
    full = torch.tensor([0, 16, 32, 40, 60], dtype=torch.int32)

    kept = boundaries(full, torch.tensor([0, 3, 8, 9, 12]), unit=4)

    assert kept.tolist() == [0, 8, 16, 20]
    assert kept.dtype == torch.int32


def entering(parts: Anatomy, inputs: dict[str, Tensor]) -> tuple[list[Tensor], Tensor, dict[Any, tuple[Tensor, ...]]]:
    """Inputs of each decoder layer, the rotary positions, and what enters each layer's attention."""
    hidden: list[Tensor] = []
    seen: dict[Any, tuple[Tensor, ...]] = {}
    positions: list[Tensor] = []

    def spy(original: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        seen[module] = (query, key, value)
        return original(module, query, key, value, mask, **options)

    handles = [layer.register_forward_pre_hook(lambda module, args: hidden.append(args[0])) for layer in parts.layers]
    handles.append(parts.language_model.rotary_emb.register_forward_pre_hook(lambda module, args: positions.append(args[1])))
    with torch.no_grad(), attention_as(spy):
        parts.model(**inputs)
    for handle in handles:
        handle.remove()
    return hidden, positions[0], seen


@pytest.mark.parametrize("family", FAMILIES)
def test_queries_keys_and_values_are_those_that_enter_attention(family: str) -> None:
    body = BODIES[family]
    parts = anatomy(body.model())
    hidden, positions, seen = entering(parts, body.inputs(RAGGED))
    layers = [layer for layer in range(len(parts.layers)) if layer not in parts.traits().recurrent]
    for layer in layers:
        rope = parts.rotary(layer, hidden[layer], positions)
        with torch.no_grad():
            query, key = parts.query_key(layer, hidden[layer], rope)
            made, value = parts.keys_values(layer, hidden[layer], rope)
        for mine, theirs in zip(
            (query, key, made, value), (*seen[parts.attention(layer)][:2], *seen[parts.attention(layer)][1:])
        ):
            torch.testing.assert_close(mine, theirs, **CLOSE)
    assert len(layers) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_each_frequency_turns_by_the_axis_named(family: str) -> None:
    body = BODIES[family]
    parts = anatomy(body.model())
    text = {"qwen2_vl": [0, 0, 1, 1, 2, 2], "qwen2_5_vl": [0, 0, 1, 1, 2, 2]}

    assert parts.axis_of_frequency.tolist() == text.get(family, [0, 1, 2, 0, 1, 2])
    assert parts.rotary_axes == (2, 2, 2)
    assert parts.traits().rotary_rows == 3


def turned(parts: Anatomy, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys of one full-attention layer, rotated at ``positions`` ``[R, B, n]``."""
    layer = len(parts.layers) - 1
    made = torch.Generator().manual_seed(3)
    heads, width = parts.config.num_attention_heads, parts.attention(layer).head_dim
    query, key = (torch.randn(1, heads, positions.shape[-1], width, generator=made) for _ in range(2))
    return parts.rotate(layer, query, key, parts.rotary(layer, query, positions))


def test_a_table_of_several_ids_that_agree_is_the_plain_one(parts: Anatomy) -> None:
    """A token merged of one member: all K slots hold its position (exact)."""
    positions = torch.randint(0, 40, (3, 1, 9), generator=torch.Generator().manual_seed(0))
    plain = turned(parts, positions)

    for several in (1, 2):
        query, key = turned(parts, positions.repeat_interleave(several, dim=0))
        assert torch.equal(query, plain[0])
        assert torch.equal(key, plain[1])


def test_one_row_of_positions_stands_for_all_axes(parts: Anatomy) -> None:
    """That is how `generate` passes the positions of a later turn of text; in the first it adds a row for the mask."""
    row = torch.randint(0, 40, (1, 1, 9), generator=torch.Generator().manual_seed(0))
    plain = turned(parts, row.expand(3, -1, -1))

    assert torch.equal(turned(parts, row)[0], plain[0])
    assert torch.equal(turned(parts, torch.cat([row + 1, row.expand(3, -1, -1)]))[0], plain[0])


def test_each_part_of_an_axis_turns_by_its_own_id(parts: Anatomy) -> None:
    """Two frequencies an axis, K = 2: the lower one of each axis follows slot 0, the other slot 1."""
    first, second = torch.randint(0, 40, (2, 3, 1, 9), generator=torch.Generator().manual_seed(0)).unbind()
    both = torch.stack([first, second], dim=1).flatten(0, 1)  # t0 t1 h0 h1 w0 w1
    axes = parts.axis_of_frequency
    slot = torch.stack([axes[:i].eq(axis).sum() for i, axis in enumerate(axes)])
    width = parts.attention(len(parts.layers) - 1).head_dim
    rotated = torch.cat([slot, slot])
    of_slot = torch.cat([rotated, torch.zeros(width - len(rotated), dtype=torch.long)])

    query, _ = turned(parts, both)

    assert slot.sort().values.tolist() == [0, 0, 0, 1, 1, 1]
    expected = torch.where(of_slot == 1, turned(parts, second)[0], turned(parts, first)[0])
    assert torch.equal(query, expected)
    assert not torch.equal(query, turned(parts, first)[0])


def test_layers_without_attention_are_named_and_refuse() -> None:
    parts = anatomy(tiny.qwen3_5())

    assert parts.traits().recurrent == (0, 1, 2, 4, 5, 6)
    assert all(hasattr(parts.layers[i], "linear_attn") for i in parts.traits().recurrent)
    with pytest.raises(FoveateError, match=r"decoder layer 4: has a recurrent state .* layers with attention: 3, 7"):
        parts.query_key(4, torch.zeros(1, 1, 48), None)


def test_of_a_gated_projection_the_queries_are_taken() -> None:
    parts = anatomy(tiny.qwen3_5())
    x = torch.randn(1, 5, 48)
    attention = parts.attention(3)
    before, _ = parts.query_key(3, x, None)
    gates = attention.q_proj.weight.detach().reshape(4, 2, 24, 48)
    with torch.no_grad():
        gates[:, 1] += 1
    after, _ = parts.query_key(3, x, None)

    assert torch.equal(before, after)
    assert before.shape == (1, 4, 5, 24)


def test_what_the_encoder_offers(parts: Anatomy) -> None:
    traits = parts.traits()

    assert parts.encoder.packed
    assert (traits.encoder_layers, traits.feature_layer, traits.has_cls) == (4, 3, False)
    assert traits.cell == (3, 8, 8)
    assert traits.vision_sites == {"patches", "projected"}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_placeholders_are_the_tokens(family: str) -> None:
    body = BODIES[family]
    parts = anatomy(body.model())
    inputs = body.inputs(ONE)

    assert parts.image_tokens == (tiny.IMAGE,)
    assert parts.video_tokens == (tiny.VIDEO,)
    (picture,) = parts.pictures({"image_grid_thw": inputs["image_grid_thw"]})
    assert len(picture.placement) == int((inputs["input_ids"] == tiny.IMAGE).sum())
