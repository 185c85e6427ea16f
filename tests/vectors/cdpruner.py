"""CDPruner: relevance of a companion's embeddings, and the greedy order with its gains.

The release scales relevance over all tiles of a picture at once: here they are one long image up to that point.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.items import ItemBatch
from foveate.core.signal import Aligned
from foveate.methods import CDPruner
from foveate.methods.before_llm.cdpruner import EPSILON, likeness, scaled
from foveate.ops.dpp import greedy_map
from tests.vectors import Case


def check_relevance(case: Case) -> None:
    assert_close(_relevance(case), case["relevance"], atol=1e-5, rtol=0)


def check_order_and_gains(case: Case) -> None:
    order, gains = greedy_map(case["features"], _relevance(case), case["budget"])

    assert order.sort(dim=1).values.tolist() == case["order"].sort(dim=1).values.tolist()
    assert_close(gains, case["gain"], atol=1e-4, rtol=0)
    # Which of two that gain as much comes first is left to the rounding of the machine's matrix products.
    place = (case["order"][:, None] == order[..., None]).int().argmax(2)
    assert_close(case["gain"].gather(1, place), case["gain"], atol=2e-4, rtol=0)


def check_tokens_kept_of_one_tile(case: Case) -> None:
    features = case["features"]
    if len(features) > 1:
        order, _ = greedy_map(features, _relevance(case), case["budget"])
        assert order.sort(dim=1).values.tolist() == case["keep"].tolist()
        return
    count = features.shape[1]
    batch = ItemBatch(
        rows=1,
        columns=count,
        ordinal=torch.arange(count)[None],
        number=(0,),
        seen={Aligned(): case["image_embeds"]},
        x=features,
        question=torch.zeros(1, 0, features.shape[2]),
        companion=(case["text_embeds"],),
        seed=0,
        device=features.device,
    )

    assert CDPruner().select(batch, case["budget"]).tolist() == case["keep"].tolist()


def _relevance(case: Case) -> Tensor:
    embeds = case["image_embeds"]
    whole = scaled(-likeness(embeds.flatten(0, 1)[None], [case["text_embeds"]]), floor=EPSILON)
    return whole.reshape(embeds.shape[:2])
