"""The parts of vLLM's plug-in that need no vLLM: what is admitted, what is kept, who a picture is, and which rows stay."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig

from foveate import FoveateError, reference
from foveate.core.recipe import Recipe
from foveate.models import anatomy
from foveate.models.anatomy import Picture, View
from foveate.models.specimens import SHAPES, specimen
from foveate.serving.settings import FULL
from foveate.serving.vllm import ARCHITECTURES, contract
from foveate.serving.vllm.admission import Pruning, fitting
from foveate.serving.vllm.encoding import even
from foveate.serving.vllm.families import FAMILIES
from foveate.serving.vllm.fields import apart, ours, packed, stretched, unpacked, with_places
from foveate.serving.vllm.identity import identity
from tests.serving.recorded import MODELS, RECIPES, read, replayed


def config_of(family):
    return AutoConfig.for_model(family, **deepcopy(SHAPES[family]))


def pruning_of(family, recipe, **bounds):
    config = config_of(family)
    config.foveate = {"recipe": recipe, **bounds}
    return Pruning.of(family, config)


# Which rows stay.


@pytest.mark.parametrize(("family", "number"), [(family, number) for family in MODELS for number in (0, 1)])
def test_recorded_rows_of_vllms_tower_give_what_the_engine_kept(family, number):
    recording = read(family)
    config = AutoConfig.from_pretrained(reference.path(MODELS[family]))
    ((rows, place),) = replayed(family, RECIPES[family][number], config, recording)
    columns = int(recording["grid"][0, 2]) // 2 if "grid" in recording else 12
    kept = (place[:, 1] * columns + place[:, 2]).tolist()
    assert kept == recording[f"kept.{number}"].tolist()
    assert torch.equal(rows, recording["rows"][kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_are_told_of_a_model_what_attach_tells_them(family):
    ours, theirs = FAMILIES[family].traits(config_of(family)), anatomy(specimen(family)).traits()
    own = {"fingerprint", "artifacts", "cell", "merge", "reuses"}  # what a server does not offer
    assert {f.name for f in fields(ours) if getattr(ours, f.name) != getattr(theirs, f.name)} <= own
    assert ours.fingerprint == theirs.fingerprint


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
@given(size=st.tuples(st.integers(8, 400), st.integers(8, 400)))
def test_tiles_are_laid_out_as_attach_lays_them_out(family, size):
    bound = {"image_sizes": torch.tensor([size, (64, 64)])}
    mine = FAMILIES[family].pictures(config_of(family))(bound)
    theirs = anatomy(MADE[family]).pictures(bound)
    for one, other in zip(mine, theirs, strict=True):
        assert torch.equal(one.placement, other.placement)
        assert all(torch.equal(a.cells, b.cells) for a, b in zip(one.views, other.views, strict=True))


MADE = {family: specimen(family) for family in ("llava_next", "llava_onevision")}


@pytest.mark.parametrize(
    ("recipe", "keep", "kept"),
    [
        ("hiprune(keep=64)", 5, 10 + 6),  # of each view, and line ends
        ("hiprune(keep=64)", 0.5, 8 + 24 + 6),
        ("hiprune(keep=64)", FULL, 16 + 48 + 6),
        ("hiprune(keep=64)", 1000, 16 + 48 + 6),
        ("divprune(keep=0.2)", 0.2, 13 + 6),  # of both together
        ("visionzip(keep=4)", 4, 8 + 6),
    ],
)
def test_what_is_kept_of_a_picture_of_two_views_and_line_ends(recipe, keep, kept):
    lines = torch.tensor([[1, cell] for row in range(6) for cell in (*range(8 * row, 8 * row + 8), -1)])
    lines[lines[:, 1] < 0] = -1
    overview = torch.stack([torch.zeros(16, dtype=torch.long), torch.arange(16)], dim=1)
    picture = Picture((View(4, 4), View(6, 8)), torch.cat([overview, lines]))
    pruning = pruning_of("llava_next", recipe)
    assert pruning.kept(keep, picture) == kept
    ((rows, place),) = even([picture], [torch.arange(picture.count)[:, None].float()], [kept])
    assert len(rows) == len(place) == kept
    assert int((place[:, 0] < 0).sum()) == 6
    assert rows[:, 0].tolist() == sorted(set(rows[:, 0].tolist()))


def test_a_request_stays_within_the_operators_bounds():
    pruning = pruning_of("llava", "hiprune(keep=8)", min_keep=4, max_keep=0.5)
    picture = Picture((View(4, 4),))
    assert (pruning.kept(pruning.asked(), picture), pruning.kept(pruning.most, picture)) == (8, 8)
    for keep in (3, 9, 0.75, FULL):
        with pytest.raises(FoveateError, match=r"this server allows 4 to 8"):
            pruning.kept(keep, picture)


# What is admitted.


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_that_fit(family):
    known = FAMILIES[family]
    fit = fitting(known.traits(config_of(family)), known.built(config_of(family)))
    assert {"hiprune", "random", "uniform", "divprune", "visionzip", "zoo_prune"} <= set(fit)
    assert ("scope" in fit) == (not known.packed and family != "llava_onevision")
    assert not {"fastv", "cdpruner", "prumerge", "ppe", "snapkv", "downsample", "shortv", "tome"} & set(fit)


@pytest.mark.parametrize(
    ("family", "recipe", "reason"),
    [
        ("llava", "fastv", r"acts inside of the language model \(decoder\[2\]\)"),
        ("llava", "snapkv", "owns the KV cache"),
        ("llava", "cdpruner", "reads the question"),
        ("llava", "tome", "acts inside of the encoder"),
        ("llava", "downsample", "acts before the encoder"),
        ("llava", "shortv", "acts inside of the model"),
        ("llava", "prumerge", "has no fixed keep"),
        ("llava", "evs", "has no fixed keep"),
        ("llava", "ppe", "gives tokens rotary positions of its own"),
        ("llava", "embedlens", "needs numbers that are calibrated"),
        ("llava", "core(keep=8)", r"reads Side \(masks\), which vLLM does not show"),
        ("llava", "hiprune(object_layer=8)", r"reads encoder\[7\], but vLLM builds no block of the encoder above 6"),
        ("llava", "hiprune(positions='anchor')", r"positions='anchor': a server of llava has 'contiguous'"),
        ("qwen2_5_vl", "hiprune(positions='rank')", r"positions='rank': a server of qwen2_5_vl has 'anchor'"),
        ("qwen2_5_vl", "scope", "needs a CLS token"),
        ("llava", "divprune(layer=2)", r"acts inside of the language model"),
        ("llava", "hiprune + fastv", "a server runs one method"),
        ("llava", "none", "a server runs one method"),
    ],
)
def test_what_a_server_cannot_run_is_refused_in_a_line(family, recipe, reason):
    with pytest.raises(FoveateError, match=reason) as raised:
        pruning_of(family, recipe)
    assert "\n" not in str(raised.value)


def test_no_recipe_is_no_recipe():
    assert Pruning.of("llava", config_of("llava")) is None


def test_settings_that_are_none_are_refused():
    with pytest.raises(FoveateError, match="'recipes' is no setting"):
        pruning_of("llava", "hiprune", recipes="x")


# Who a picture is.


def test_identities_differ_in_whatever_makes_another_encoding(monkeypatch):
    hiprune = Recipe.of("hiprune(keep=64)").methods[0]
    known = {
        identity("a", hiprune, 64),
        identity("b", hiprune, 64),
        identity("a", hiprune, 32),
        identity("a", hiprune, 0.5),
        identity("a", hiprune, FULL),
        identity("a", Recipe.of("hiprune(keep=64, alpha=0.2)").methods[0], 64),
        identity("a", Recipe.of("scope(keep=64)").methods[0], 64),
    }
    assert len(known) == 7
    assert all(len(one) == 64 and int(one, 16) for one in known)
    # The recipe's own budget does not count where a request has another, so that both find what the other encoded.
    assert identity("a", Recipe.of("hiprune(keep=32)").methods[0], 64) in known
    monkeypatch.setattr("foveate.serving.vllm.identity.__version__", "0.0.0")
    assert identity("a", hiprune, 64) not in known


# What travels with a picture.


@pytest.mark.parametrize("keep", [1, 64, 100000, 0.25, 1.0, FULL])
@pytest.mark.parametrize("counted", [True, False])
def test_a_keep_arrives_as_it_was_sent(keep, counted):
    arrived = unpacked(packed(keep, counted)[0])
    assert arrived == (keep, counted)
    assert type(arrived[0]) is type(keep)


def test_options_of_ours_are_told_from_the_processors():
    assert ours({"foveate_keep": 3, "size": 4, "foveate_dummy": True}) == ({"size": 4}, 3, True)
    assert ours({}) == ({}, FULL, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_ride_with_rows_in_any_dtype(dtype):
    rows, place = (
        torch.randn(5, 8).to(dtype),
        torch.tensor([[0, 0, 0], [0, 255, 256], [0, 257, 999], [3, 4095, 1], [0, 1, 2047]]),
    )
    again, where = apart(with_places(rows, place))
    assert torch.equal(again, rows)
    assert torch.equal(where, place)


def test_a_prompt_is_stretched_to_what_its_pictures_had():
    # Two of six placeholders are left of a picture; a video of three is whole.
    whole, found, columns = stretched([1, 9, 9, 2, 8, 8, 8, 3], [(1, 2, 6), (4, 3, None)])
    assert whole == [1, 9, 9, 9, 9, 9, 9, 2, 8, 8, 8, 3]
    assert found == [(1, 6), (8, 3)]
    assert columns.tolist() == [0, 1, 1, 7, 8, 9, 10, 11]
    assert stretched([1, 2], []) == ([1, 2], [], pytest.approx(torch.tensor([0, 1])))


# Where vLLM is.


@pytest.mark.parametrize(
    ("version", "known"), [("0.32.0", True), ("0.32", True), ("0.32.1+cpu", True), ("0.33.0", False), ("0.320", False)]
)
def test_tested_versions(version, known):
    assert contract.tested(version) == known


def test_every_family_has_an_architecture():
    assert set(ARCHITECTURES.values()) == set(FAMILIES)
