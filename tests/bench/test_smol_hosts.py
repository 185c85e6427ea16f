"""The hosts of ``benchmarks.smol`` on a small text model: what is remembered changes nothing, and both count alike."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from benchmarks.smol_hosts import Hooked, Housed, Remembered
from tests.hub import write_text_checkpoint
from torch import Tensor

from foveate.checkpoint import Checkpoint, load

needs_kvpress = pytest.mark.skipif(
    not all(map(find_spec, ("kvpress", "cachetools", "fire"))),
    reason="kvpress is not installed: pip install 'foveate[kvpress]', then pip install --no-deps kvpress",
)
SAME: list[tuple[str, str, dict[str, int]]] = [
    ("snapkv(window=4, keep=0.5)", "SnapKVPress", {"window_size": 4}),
    ("streamingllm(keep=0.5, steps=False)", "StreamingLLMPress", {}),
]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return load(str(write_text_checkpoint(tmp_path)), "cpu", "float32")


def ids(checkpoint: Checkpoint, rows: int, count: int = 40) -> Tensor:
    drawn = torch.Generator().manual_seed(count)
    return torch.randint(4, checkpoint.model.config.vocab_size, (rows, count), generator=drawn)


def never(new: Tensor) -> Tensor:
    return torch.zeros(len(new), dtype=torch.bool)


def test_what_is_remembered_changes_nothing(checkpoint: Checkpoint) -> None:
    prompt, host = ids(checkpoint, 2), Housed(checkpoint, "snapkv(window=4, keep=0.5)")
    plain = host.answer(prompt, 4, never)

    remembered = Remembered(checkpoint.model)
    with remembered.reading(), torch.inference_mode():
        checkpoint.model(input_ids=prompt, use_cache=True)
    assert torch.equal(host.answer(prompt, 4, never), plain)
    assert remembered.hits == 5 * len(checkpoint.model.model.layers)
    assert remembered.misses == 0

    other = prompt.flip(1)
    unlike = host.answer(other, 4, never)
    assert remembered.misses > 0
    assert torch.equal(host.answer(other, 4, never), unlike)


def test_the_loss_is_that_of_the_model(checkpoint: Checkpoint) -> None:
    both = ids(checkpoint, 1, 60)
    loss, taken = Housed(checkpoint).loss(both[:, :40], both[:, 40:])

    with torch.inference_mode():
        logits = checkpoint.model(input_ids=both).logits[0, 39:-1]
    assert loss == pytest.approx(float(torch.nn.functional.cross_entropy(logits, both[0, 40:])), abs=1e-5)
    config = checkpoint.model.config
    assert taken == 40 * config.num_hidden_layers * 2 * config.num_key_value_heads * config.head_dim * 4


def test_an_answer_ends_where_nothing_more_counts(checkpoint: Checkpoint) -> None:
    new = Housed(checkpoint).answer(ids(checkpoint, 2), 6, lambda new: torch.full((len(new),), new.shape[1] == 2))

    assert new.shape == (2, 2)


@needs_kvpress
@pytest.mark.parametrize(("recipe", "press", "options"), SAME)
def test_both_hosts_do_the_same(checkpoint: Checkpoint, recipe: str, press: str, options: dict[str, int]) -> None:
    here, there = Housed(checkpoint, recipe), Hooked(checkpoint, press, options, keep=0.5)
    both, several = ids(checkpoint, 1, 60), ids(checkpoint, 3)

    assert here.loss(both[:, :40], both[:, 40:]) == pytest.approx(there.loss(both[:, :40], both[:, 40:]), abs=1e-5)
    assert torch.equal(here.answer(several, 4, never), there.answer(several, 4, never))
    prompts = ["what is it? " * 4, "and what is that?"]
    assert here.converse(prompts, 3) == there.converse(prompts, 3)
    assert len(here.step_seconds(several, 3)) == len(there.step_seconds(several, 3)) == 3
