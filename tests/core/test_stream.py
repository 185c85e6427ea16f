"""What is remembered of a stream."""

from __future__ import annotations

import torch

from foveate.core.stream import Memory


def test_methods_do_not_share_keys() -> None:
    memory = Memory()
    memory.put("a", "seen", 1)
    memory.put("b", "seen", 2)

    assert [memory.get(method, "seen") for method in "abc"] == [1, 2, None]
    assert memory.get("a", "other", 7) == 7


def test_its_size_is_that_of_all_tensors_in_it() -> None:
    memory = Memory()
    memory.put("a", 0, (torch.zeros(3, 4), 5))
    memory.put("a", 1, {"x": [torch.zeros(2, dtype=torch.float64)]})

    assert memory.nbytes == 48 + 16


def test_a_draft_counts_once_it_is_taken() -> None:
    memory = Memory()
    memory.put("a", 0, 1)
    draft = memory.draft()
    draft.put("a", 0, 2)

    assert (memory.get("a", 0), draft.get("a", 0)) == (1, 2)
    memory.take(draft)
    assert (memory.get("a", 0), draft.get("a", 0)) == (2, None)


def test_a_new_stream_knows_nothing() -> None:
    memory = Memory()
    memory.put("a", 0, torch.zeros(3))
    memory.owner = object()
    memory.reset()

    assert (memory.get("a", 0), memory.owner, memory.nbytes) == (None, None, 0)
