"""The story that a watched session tells, on every method and anatomy, against what the trace and the report say."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import generate, logits
from tests.suite.pairs import HOSTED, artifacts, variants

import foveate
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.exits import Exits
from foveate.core.method import Cache, Experts, Method, Pictures
from foveate.core.report import Trace
from foveate.core.roles import Item, Role
from foveate.core.signal import Columns, Site
from foveate.core.weights import Weights
from foveate.engine.session import Session
from foveate.methods import IndexPreserving
from foveate.report.stages import Stage, _shown, story

CACHE = ("in the KV cache", "read from the KV cache")
UNSCORED = {"core", "embedlens", "pixelprune", "pool", "random", "uniform", "shortv"}
"""They rank nothing."""
ONE_OF_EACH_KIND = (
    "tome(keep=6)",
    "scope(keep=6)",
    "fastv(keep=6)",
    "hidrop(late_entry=2, layer_list=(2,), keep_list=(6,), early_exit=4)",
    "snapkv(keep=0.5, window=4)",
    "sparsevila(keep=8, decode_keep=0.5)",
)


def watched(method: Method | str, body: Body, samples: list[tuple[int, int, int]], steps: int = 1) -> Session:
    """A session that has watched a prompt being read; detached."""
    model = body.model()
    with foveate.attach(model, method, artifacts=artifacts(body)) as session:
        session.watch()
        generate(model, body.inputs(samples), steps)
    return session


def through_layers(stages: tuple[Stage, ...]) -> list[Stage]:
    return [stage for stage in stages if stage.title not in CACHE]


@pytest.mark.parametrize(("method", "body"), HOSTED)
def test_those_alive_at_the_end_of_the_story_are_those_behind_the_last_layer(method: Method, body: Body) -> None:
    session = watched(method, body, RAGGED)
    alive = session.trace.alive(len(session.anatomy.layers))

    for sample, (_, pictures, _) in enumerate(RAGGED):
        told = story(session.trace, pictures, sample)
        last = through_layers(told.stages)[-1]
        expected = [sorted(ordinals.tolist()) for ordinals in alive[sample]]
        assert [grid.tolist() for grid in last.alive] == expected
        assert told.grids == tuple(session.trace.grids[sample])
        assert len(set(told.pictures)) == pictures
        assert sum(map(len, last.alive)) == session.trace.log[0][-1].visual[sample]


@pytest.mark.parametrize("recipe", ONE_OF_EACH_KIND)
def test_watching_changes_nothing(recipe: str) -> None:
    body = BODIES["llava-clip"]
    plain, seen = body.model(), body.model()
    with foveate.attach(plain, recipe):
        expected = logits(generate(plain, body.inputs(RAGGED), 3))
    with foveate.attach(seen, recipe) as session:
        session.watch()
        assert torch.equal(logits(generate(seen, body.inputs(RAGGED), 3)), expected)


@pytest.mark.parametrize("recipe", ONE_OF_EACH_KIND)
def test_nothing_is_remembered_where_nobody_watches(recipe: str) -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with foveate.attach(model, recipe) as session:
        generate(model, body.inputs(ONE), 2)

    assert (session.trace.steps, session.trace.held, session.trace.pictures) == ([], [], [])


OF_VIDEOS = {"evs", "omnizip_av"}
ELSEWHERE = (Exits, Experts, Pictures)
"""What these do happens to no tokens."""
LACKING = {"press"} - {name for name in ("press",) if find_spec("kvpress")}
"""Their library is not here."""
HERE = [
    name for name, kind in registry.methods().items() if name not in OF_VIDEOS | LACKING and not issubclass(kind, ELSEWHERE)
]


@pytest.mark.parametrize("name", HERE)
def test_methods_show_what_they_rank_by(name: str) -> None:
    method = IndexPreserving(kernel=1) if name == "index_preserving" else variants(name)[0]
    told = story(watched(method, BODIES["llava-clip"], ONE).trace, 1)
    acted = [stage for stage in told.stages if stage.method == name]

    if isinstance(method, Weights) or (isinstance(method, Cache) and type(method).pack is not Cache.pack):  # all tokens stay
        assert not acted
        return
    assert acted
    assert any(stage.scores for stage in acted) == (name not in UNSCORED)


def test_scores_are_those_of_the_signal_and_the_best_are_kept() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with foveate.attach(model, "fastv(keep=6, layer=2, score='all')") as session:
        session.watch()
        session.retain()
        generate(model, body.inputs(ONE), 1)
    assert session.read is not None
    received = session.read[1][Columns(Site("decoder", 1))]  # of the rows that are left
    stage, layout = story(session.trace, 1).stages[-1], session.trace.log[0][-1]

    (scores,), (alive,) = stage.scores[0], stage.alive
    assert stage.title == "LLM layers 2–3"
    assert sorted(np.argsort(-scores, kind="stable")[:6]) == alive.tolist()
    assert scores[alive] == pytest.approx(received[layout.rows(Role.IMAGE)].numpy())


@pytest.mark.parametrize("method", [m for name in ("snapkv", "mixkv", "prefixkv") for m in variants(name)], ids=str)
def test_entries_held_add_up_to_the_cache_s_bytes(method: Method) -> None:
    session = watched(method, BODIES["llava-clip"], ONE)
    config = session.anatomy.config
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads

    stored_by_head = getattr(method, "host", "") == "adakv"  # in blocks, which are larger than what is in them
    for held, size in zip(session.trace.held, () if stored_by_head else session.report.kv_bytes):
        entries = int((held.tokens >= 0).sum()) * (heads if held.tokens.shape[1] == 1 else 1)
        assert 2 * entries * width * 4 == size
    stage = story(session.trace, 1).stages[-1]
    numbers = [held.layout.origin[0][held.layout.ordinal[0] >= 0] for held in session.trace.held]
    visual = [
        int(torch.isin(held.tokens, of_visual).sum()) / held.tokens.shape[1]
        for held, of_visual in zip(session.trace.held, numbers, strict=True)
    ]
    assert stage.title == "in the KV cache"
    assert stage.count == pytest.approx(np.mean(visual))
    assert [sum(grid.sum() for grid in shares) for _, shares in stage.by_layer] == pytest.approx(visual)


def test_merged_tokens_conserve_every_patch() -> None:
    told = story(watched("tome(keep=6)", BODIES["llava-clip"], ONE).trace, 1)
    (fate,) = told.stages[-1].fate

    assert told.stages[-1].merged
    assert (fate >= 0).all()
    assert len(set(fate)) == 6
    assert [stage.count for stage in told.stages] == sorted((stage.count for stage in told.stages), reverse=True)


def test_many_encoder_blocks_are_told_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("foveate.report.stages.MOST_BLOCKS", 2)
    told = story(watched("tome(r=(1, 1, 1, 0))", BODIES["llava-clip"], ONE).trace, 1)

    assert [stage.title for stage in told.stages[1:]] == ["in the encoder, block 0", "in the encoder, blocks 1–2"]
    assert [stage.count for stage in told.stages] == [16, 15, 13]


def test_tiles_are_told_grid_by_grid() -> None:
    body = BODIES["llava_next"]
    model = body.model()
    with foveate.attach(model, "uniform(keep=0.5)") as session:
        session.watch()
        generate(model, body.inputs([(3, 2, 6)], sizes=[(40, 64)]), 1)
    told = story(session.trace, 2)

    assert told.grids == ((4, 4), (6, 8), (4, 4), (6, 8))
    assert told.pictures == (0, 0, 1, 1)
    assert [len(alive) for alive in told.stages[-1].alive] == [8, 24, 8, 24]


def test_a_later_turn_without_a_picture_has_a_story_of_its_own() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    with foveate.attach(model, "sparsevila(keep=8, decode_keep=0.5)") as session:
        session.watch()
        first = generate(model, inputs, 2)
        longer = body.extended(dict(inputs, input_ids=first.sequences), torch.tensor([[12, 13]]))
        longer["attention_mask"] = torch.ones_like(longer["input_ids"])
        generate(model, body.without_pictures(longer), 1, past_key_values=first.past_key_values)
    with pytest.raises(FoveateError, match="holds no picture"):
        story(session.trace, 1)


def test_the_unmodified_model_has_a_story_of_one_stage() -> None:
    told = story(watched("none", BODIES["llava-clip"], RAGGED).trace, 2, sample=1)

    assert [stage.count for stage in told.stages] == [32]
    assert told.pictures == (0, 1)


def test_a_trace_without_pictures_is_refused() -> None:
    with pytest.raises(FoveateError, match="trace: holds no picture"):
        story(Trace(), 1)


def test_tiles_with_placeholders_of_their_own_show_one_picture() -> None:
    items = [Item(2, 2, source) for source in range(4)]
    trace = Trace(pictures=[3, 4, 5, 6])

    assert _shown(trace, 1, items) == (0, 0, 0, 0)
    assert _shown(trace, 2, items) == (0, 0, 1, 1)
    assert _shown(trace, 4, items) == (0, 1, 2, 3)
    with pytest.raises(FoveateError, match="nobody knows which of 3 pictures each of 4 tiles shows"):
        _shown(trace, 3, items)
