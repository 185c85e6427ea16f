"""DocPrune: the card's examples and limiting cases, and a rendered page with embeddings beside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate import tasks
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Hidden, Side, Site
from foveate.core.state import State
from foveate.methods import DocPrune
from foveate.methods.before_encoder.docprune import background_shares, relevance, smoothed, visual_scores
from tests import tiny
from tests.methods.bodiless import traits
from tests.suite.bodies import BODIES, RAGGED
from tests.videos import qwen_pixels
from tests.waits import waits

OPEN = dict(vision_sites=frozenset({"patches"}), cell=(3, 8, 8), merge=2)
MEAN, STD = (torch.tensor(getattr(DocPrune(), name))[:, None, None] for name in ("mean", "std"))
EMBEDDINGS = torch.tensor([[1.0, 0], [0, 1], [1, 1]]), torch.tensor([[1.0, 0], [1, 1]])


def shares(grey: Any, tolerance: float = 1.0) -> Tensor:
    """Of one page, one patch a cell."""
    cells = torch.as_tensor(grey, dtype=torch.float32)[None, :, None]
    return background_shares(cells, torch.ones(cells.shape[:2], dtype=torch.bool), tolerance)[0, :, 0]


def test_background_is_strictly_nearer_than_the_tolerance() -> None:
    assert shares([[255, 255, 254, 10]]).tolist() == [0.5]
    assert shares([[255, 255, 254, 10]], tolerance=2).tolist() == [0.75]


def test_a_brighter_page_has_the_same_background() -> None:
    page = torch.randint(0, 5, (12, 16), generator=torch.Generator().manual_seed(0))
    assert torch.equal(shares(page), shares(page + 200))


def test_padding_is_no_background() -> None:
    page = torch.tensor([[[[7.0, 7, 3]], [[9, 9, 9]]]])
    assert background_shares(page, torch.tensor([[True, False]]))[0, 0].tolist() == pytest.approx([2 / 3])


def test_the_cards_relevance() -> None:
    assert_close(relevance(*EMBEDDINGS), torch.tensor([1.7071, 0.7071, 1.7071]), rtol=0, atol=1e-4)
    assert_close(relevance(*EMBEDDINGS, "mean"), relevance(*EMBEDDINGS) / 2)
    assert_close(relevance(*EMBEDDINGS, "minmax"), torch.tensor([1.0, 0, 1]))


def test_smoothing_leaves_an_even_page_and_is_that_of_its_weights() -> None:
    assert_close(smoothed(torch.full((4, 3), 2.0), (8, 9)), torch.full((8, 9), 2.0))
    spot = torch.zeros(9, 9)
    spot[4, 4] = 1
    weights = torch.exp(-0.5 * torch.arange(-3.0, 4) ** 2)
    expected = torch.zeros(9, 9)
    expected[1:8, 1:8] = torch.outer(weights, weights) / weights.sum() ** 2
    assert_close(smoothed(spot, (9, 9)), expected)
    assert torch.equal(smoothed(spot, (9, 9), sigma=0), spot)


@pytest.mark.parametrize(
    ("score", "expected"),
    [("agg_logit", [1.2449, 0.7551, 1.2449, 0.7551]), ("mean_prob", [1.1621, 0.4695, 0.7116, 0.9451])],
)
def test_the_cards_scores(score: Any, expected: list[float]) -> None:
    logits = torch.tensor([[[2.0, 0, 1, -1, 1], [0, 1, 1, 2, 1]]])
    prompt = torch.ones(1, 5, dtype=torch.bool)
    visual = torch.tensor([[True] * 4 + [False]])
    found = visual_scores(logits, visual, prompt, 2, score)
    assert_close(found, torch.tensor([[*expected, 0]]), rtol=0, atol=1e-4)
    assert (found >= 0.75)[0, :4].tolist() == ([True] * 4 if score == "agg_logit" else [True, False, False, True])


@pytest.mark.parametrize("score", ["agg_logit", "kv_group"])
def test_scores_over_visual_tokens_are_one_on_average_and_one_if_all_are_alike(score: Any) -> None:
    visual = torch.tensor([[True] * 6 + [False] * 2, [False] * 3 + [True] * 3 + [False] * 2])
    prompt = torch.ones_like(visual)
    logits = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    assert_close(visual_scores(logits, visual, prompt, 2, score).sum(1), torch.tensor([6.0, 3]))
    assert_close(visual_scores(torch.zeros(2, 4, 8), visual, prompt, 2, score), visual.float())
    by_hand = (logits[:, :2].mean(1), logits[:, 2:].mean(1)) if score == "kv_group" else (logits.mean(1),)
    mine = torch.stack([of[0, :6].softmax(0) for of in by_hand]).mean(0) * 6
    assert_close(visual_scores(logits, visual, prompt, 2, score)[0, :6], mine)


def test_the_cut_is_behind_the_first_layer_whose_norm_is_large_enough_for_each_sample_on_its_own() -> None:
    norms = [[12.0, 30, 47, 44, 60], [50, 0, 0, 0, 0], [1, 2, 3, 4, 5]]
    method, model = DocPrune(tau_comp=45, tau_att=1.0).fitted(traits(**OPEN)), traits(**OPEN)
    visual = torch.tensor([[True, True, True, False]] * 3)
    layout = Layout.build(
        visual, torch.ones_like(visual), torch.arange(4).expand(1, 3, 4), [[Item(1, 3, i)] for i in range(3)]
    )
    key = torch.tensor([[3.0, 0], [2, 0], [1, 0], [0, 1]]).expand(3, 1, 4, 2)
    state, counts = State(), []
    state.put("session", "traits", model)
    for layer in range(5):
        rows = layout.shape[1]
        x = torch.zeros(3, rows, 2)
        x[:, -1, 0] = torch.tensor([of[layer] for of in norms])

        def parts(hidden: Tensor, of: Layout) -> tuple[Tensor, Tensor]:
            ours = key.gather(2, of.origin.clamp(min=0)[:, None, :, None].expand(-1, 1, -1, 2))
            return torch.ones_like(ours) * torch.tensor([1.0, 0]), ours

        seen = {Hidden(Site("decoder", layer)): x, Function("query_key", layer): parts}
        edit = method.edit(Site("decoder", layer + 1), x, layout, seen, state)
        layout = layout if edit is None else layout.after(edit)
        counts.append(layout.visual)
    assert counts == [(3, 1, 3), (3, 1, 3), (1, 1, 3), (1, 1, 3), (1, 1, 3)]
    assert layout.origin[0, layout.rows(*VISUAL)[0]].tolist() == [0]


def test_thresholds_are_those_of_so_many_pages() -> None:
    four = DocPrune(pages=4, tau_att=0.5).fitted(traits(**OPEN))
    assert (four.tau_bg, four.tau_e, four.tau_qst, four.tau_comp, four.tau_att) == (0.8, 1.0, 0.4, 45, 0.5)
    assert DocPrune().fitted(traits(**OPEN)).tau_bg == 0.9


def page(side: int = 64) -> Tensor:
    """A rendered document ``[3, side, side]`` of whole numbers from 0 to 255."""
    image = tasks.questions("document", n=1, seed=3)[0].image.convert("RGB").resize((side, side))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def prompt(*pages: Tensor) -> dict[str, Tensor]:
    """One prompt of several pages, for a tiny Qwen2-VL: a token is 8 x 8 pixels, a patch 4 x 4."""
    ids = torch.tensor([[1, *([tiny.IMAGE] * 64 + [20]) * len(pages), 21, 22, 23]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == tiny.IMAGE).long(),
        "pixel_values": torch.cat([qwen_pixels(((one / 255 - MEAN) / STD)[None]) for one in pages]),
        "image_grid_thw": torch.tensor([[1, 16, 16]]).repeat(len(pages), 1),
    }


def kept_by_hand(picture: Tensor, tau_bg: float, relevant: np.ndarray | None = None) -> list[int]:
    """Cells of which a patch is neither background nor irrelevant."""
    grey = np.rint((picture.numpy() * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(0))
    ground = np.bincount(grey.astype(int).ravel(), minlength=256).argmax()
    kept = []
    for cell in range(64):
        for patch in range(4):
            y, x = 2 * (cell // 8) + patch // 2, 2 * (cell % 8) + patch % 2
            share = (np.abs(grey[4 * y : 4 * y + 4, 4 * x : 4 * x + 4] - ground) < 1).mean()
            if share <= tau_bg and (relevant is None or relevant[y, x]):
                kept.append(cell)
                break
    return kept


def alive(method: DocPrune, *pages: Tensor, layer: int = 0, **side: Any) -> list[list[int]]:
    """Tokens of each page that enter a decoder layer."""
    model = BODIES["qwen2_vl"].model()
    with torch.no_grad(), foveate.attach(model, method) as session, session.side(images=side):
        model(**prompt(*pages))
        return [cells.tolist() for cells in session.trace.alive(layer)[0]]


def test_of_a_rendered_page_what_is_not_its_background_is_encoded() -> None:
    expected = kept_by_hand(page(), 0.5)
    assert 8 < len(expected) < 56
    assert alive(DocPrune(tau_bg=0.5, tau_att=0), page()) == [expected]


def test_what_the_question_is_not_about_is_not_encoded_either() -> None:
    # Of a retriever's 8 x 8 embeddings, those of the upper half are what the question's are.
    found = torch.zeros(8, 8, 2)
    found[:4, :, 0] = found[4:, :, 1] = 1
    question = torch.tensor([[1.0, 0], [2, 0]])
    relevant = np.zeros((16, 16), dtype=bool)
    relevant[: 8 + 1] = True  # the blur brings in one row of patches: half of the way from 2 to 0 is at the edge
    method = DocPrune(tau_bg=0.5, tau_qst=0.4, tau_att=0)

    cells = alive(method, page(), page(), page=[found, None], question=[question, None])

    assert cells == [kept_by_hand(page(), 0.5, relevant), kept_by_hand(page(), 0.5)]
    assert len(cells[0]) < len(cells[1])
    flat = alive(method, page(), page=found.reshape(64, 2), question=question)
    assert flat == cells[:1]


def test_an_empty_page_keeps_a_token_and_noise_all() -> None:
    noise = torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(0)).float()
    assert alive(DocPrune(tau_att=0), torch.full((3, 64, 64), 250.0), noise) == [[0], list(range(64))]
    assert alive(DocPrune(tau_bg=1.0, tau_att=0), torch.full((3, 64, 64), 250.0)) == [list(range(64))]


def test_without_a_retriever_and_a_norm_that_is_reached_there_is_only_background() -> None:
    expected = alive(DocPrune(tau_bg=0.5, tau_att=0), page())
    assert alive(DocPrune(tau_bg=0.5, tau_comp=1e9), page(), layer=4) == expected
    about = dict(page=torch.ones(8, 8, 2), question=-torch.ones(3, 2))
    assert alive(DocPrune(tau_bg=0.5, tau_qst=-1e9, tau_comp=1e9), page(), layer=4, **about) == expected
    later = alive(DocPrune(tau_bg=0.5, layer=2, tau_att=1.0), page(), layer=2)
    assert set(later[0]) < set(expected[0])


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ({"page": torch.ones(8, 8, 2)}, r"side data 'question': is missing beside 'page'; give both, or neither"),
        ({"question": torch.ones(3, 2)}, r"side data 'page': is missing beside 'question'"),
        ({"page": torch.ones(7, 2), "question": torch.ones(3, 2)}, r"'page' \[7, 2\] and 'question' \[3, 2\]: must be"),
        ({"page": torch.ones(4, 4, 2), "question": torch.ones(3, 5)}, r"must be \[h, w, d\] \(or"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit_are_refused(side: dict[str, Tensor], said: str) -> None:
    with pytest.raises(FoveateError, match=rf"^docprune: [^\n]*{said}"):
        alive(DocPrune(), page(), **side)


def test_what_cannot_host_it_is_refused() -> None:
    assert "needs the site 'patches'" in (DocPrune().check(traits()) or "")
    assert "std=(1.0,): must be one for each of 3" in (DocPrune(std=(1.0,)).check(traits(**OPEN)) or "")
    assert "layer=40: must be in 1..31" in (DocPrune(layer=40).check(traits(**OPEN)) or "")
    assert "layers [1], which are recurrent" in (DocPrune(layer=2).check(traits(**OPEN, recurrent=(1,))) or "")
    assert DocPrune().sites(traits(**OPEN, recurrent=(0, 1, 2), decoder_layers=5)) == (Site("patches"), Site("decoder", 4))
    assert Side("page", needed=False) in DocPrune().reads(traits(**OPEN))


def test_a_layer_that_is_given_waits_for_nothing_but_two_counts() -> None:
    for layers in (8, 16):
        given, plain, looking = (
            len(waits(layers, RAGGED, recipe, steps=0)[0])
            for recipe in ("docprune(layer=2)", "docprune(tau_att=0.0)", "docprune(tau_comp=1000000000.0)")
        )
        assert given == plain + 1
        assert looking == plain + layers - 1
