"""Recipes that together use every protocol of a method and every form of a cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.core import registry
from foveate.core.method import Cache, Method
from foveate.core.recipe import Recipe
from foveate.engine.session import Session, attach
from tests.suite.bodies import BODIES, Body
from tests.suite.pairs import artifacts, refusal, variants
from tests.suite.test_experts import Skip

LLAVA = BODIES["llava-clip"]
MOE = BODIES["qwen3_vl_moe"]

BLOCKS = "mixkv(keep=0.5, host='adakv', window=4)"
VIEW = "sparsevila(keep=6, decode_keep=0.5)"
STEPS = "prefixkv(keep=0.5, distance=-4)"
ROWS = "snapkv(keep=0.5, window=4)"
FACTORS = "attentionpack(rank=6)"
CACHES = [ROWS, BLOCKS, VIEW, STEPS, FACTORS]
"""A cache by rows, by head, of which a part is read, one that evicts step by step, one that makes keys and values anew."""

PROTOCOLS: dict[str, tuple[Body, Recipe]] = {
    name: (body, Recipe.of(recipe))
    for name, body, recipe in (
        ("nothing", LLAVA, "none"),
        ("before the language model", LLAVA, "hiprune(keep=6)"),
        ("in the encoder", LLAVA, "tome(keep=6)"),
        ("before the encoder", LLAVA, "index_preserving"),
        ("in the language model", LLAVA, "fastv(layer=2, keep=4)"),
        ("frozen rows", LLAVA, "shortv(layers=(1,))"),
        ("rows that skip layers", LLAVA, "alvts(keep=0.4)"),
        ("cache by rows", LLAVA, ROWS),
        ("cache by head", LLAVA, BLOCKS),
        ("cache in part", LLAVA, VIEW),
        ("cache step by step", LLAVA, STEPS),
        ("cache in factors", LLAVA, FACTORS),
        ("all at once", LLAVA, f"tome(keep=9) + fastv(layer=2, keep=5) + {ROWS}"),
    )
} | {"experts": (MOE, Recipe((*Recipe.of("fastv(layer=2, keep=4)").methods, Skip(below=0.3))))}


def methods(body: Body = LLAVA, *, caches: bool | None = None) -> list[Method]:
    """All methods that a body can host, in their first setting; those that own a cache, or the others, or both."""
    found = [variants(name)[0] for name in registry.methods()]
    return [m for m in found if refusal(m, body) is None and caches in (None, isinstance(m, Cache))]


def attached(model: Any, recipe: Recipe | Method | str, body: Body = LLAVA) -> Session:
    """With what the methods need on this body."""
    return attach(model, recipe, artifacts=artifacts(body))


def told(session: Session) -> tuple[Any, ...]:
    """What a session says of the last call, seconds apart."""
    report, trace = session.report, session.trace
    alive = [[layout.origin.tolist() for layout in layouts] for layouts in trace.log]
    return report.rows, report.visual_tokens, report.active, report.kv_bytes, report.flops, report.decode_steps, alive


def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Model inputs in float64."""
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
