"""What is read of a call: packed rows are found by their positions."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError
from foveate.engine.intake import restarts
from tests.suite.bodies import BODIES, ONE, RAGGED

PLAIN = ["llava-clip", "gemma3", "llava_next"]
AXES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"]


@pytest.mark.parametrize(
    ("positions", "padding", "packed"),
    [
        ([0, 1, 2, 3, 4, 5], 0, False),
        ([3, 5, 6, 8, 11, 12], 0, False),  # behind a cache, with gaps
        ([0, 1, 2, 0, 1, 2], 0, True),
        ([0, 1, 2, 3, 0, 1], 0, True),
        ([1, 1, 0, 1, 2, 3], 2, False),  # padding may be numbered anyhow
        ([0, 1, 2, 2, 3, 4], 0, True),
    ],
)
def test_positions_that_start_again_are_found(positions: list[int], padding: int, packed: bool) -> None:
    valid = torch.arange(6)[None] >= padding
    assert restarts(torch.tensor([positions]), valid, torch.zeros_like(valid)) is packed


def test_a_grid_starts_nothing_again() -> None:
    visual = torch.tensor([[False, False, True, True, True, True, False]])
    axes = torch.tensor([[0, 1, 2, 2, 2, 2, 4], [0, 1, 2, 2, 3, 3, 4], [0, 1, 2, 3, 2, 3, 4]])[:, None]
    valid = torch.ones_like(visual)

    assert not restarts(axes, valid, visual)
    assert restarts(axes.roll(3, 2), valid, visual.roll(3, 1))  # a prompt's end, then one that begins
    assert restarts(torch.cat([axes, axes], 2), torch.cat([valid, valid], 1), torch.cat([visual, visual], 1))


@pytest.mark.parametrize("name", PLAIN)
def test_packed_rows_are_refused_with_the_remedy(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(ONE)
    rows = inputs["input_ids"].shape[1]
    packed = dict(inputs, position_ids=(torch.arange(rows) % (rows - 4))[None], attention_mask=None)
    with foveate.attach(model, "fastv(keep=4)"):
        with pytest.raises(FoveateError, match=r"position_ids: several prompts are packed into one row; [^\n]* padding$"):
            model(**packed)
        with pytest.raises(FoveateError, match=r"cu_seq_lens_q: several prompts are packed"):
            model(**inputs, cu_seq_lens_q=torch.tensor([0, 3, rows]), cu_seq_lens_k=torch.tensor([0, 3, rows]))
        model(**inputs, position_ids=torch.arange(rows)[None])


@pytest.mark.parametrize("name", [*PLAIN, *AXES])
def test_what_generate_and_the_families_number_is_not_taken_for_packed(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    seen: list[torch.Tensor] = []
    kept = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model.generate(**inputs, max_new_tokens=1)
    kept.remove()
    visual, valid = inputs["input_ids"] == 7, inputs["attention_mask"].bool()

    assert not restarts(seen[0], valid, visual)
    with foveate.attach(model, "uniform(keep=4)"):
        model(**inputs, position_ids=seen[0])
