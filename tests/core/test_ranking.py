"""What choices are made by, as whoever looks gets to see it."""

from __future__ import annotations

import torch

from foveate.core.ranking import about, collecting, ranked
from foveate.ops.select import top_k, top_rows

SCORES = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.3, 0.4]])


def same(found: list[torch.Tensor], *expected: list[list[float]]) -> bool:
    return len(found) == len(expected) and all(
        torch.equal(a.nan_to_num(-1), torch.tensor(b).nan_to_num(-1)) for a, b in zip(found, expected)
    )


def test_nobody_needs_to_look() -> None:
    assert ranked(SCORES) is SCORES


def test_what_is_ranked_is_seen() -> None:
    with collecting((2, 3)) as found:
        top_k(SCORES, 1)
        top_rows(2 * SCORES, SCORES > 0, (1, 1))
    top_k(3 * SCORES, 1)

    assert same(found, SCORES.tolist(), (2 * SCORES).tolist())


def test_scores_of_other_things_are_passed_over() -> None:
    with collecting((2, 3)) as found:
        ranked(SCORES[:, :2])
        ranked(SCORES[:, None].expand(-1, 3, -1))

    assert found == []


def test_scores_by_head_are_averaged() -> None:
    with collecting((1, 3), by_head=True) as found:
        ranked(torch.tensor([[[1.0, 2, 3], [3, 4, float("inf")]]]))

    assert same(found, [[2, 3, float("nan")]])


def test_scores_of_some_rows_stand_at_their_places() -> None:
    with collecting((1, 4)) as found:
        ranked(torch.tensor([[0.5, 0.25]]), rows=torch.tensor([[2, 0]]), total=4)

    assert same(found, [[0.25, float("nan"), 0.5, float("nan")]])


def test_pictures_that_are_ranked_one_after_the_other_are_seen_as_one() -> None:
    with collecting((2, 3)) as found:
        for sample, rows in ((0, [0, 1]), (1, [1, 2])):
            with about(torch.tensor([sample]), torch.tensor([rows]), (2, 3)):
                top_k(SCORES[sample : sample + 1, rows], 1)

    nan = float("nan")
    assert same(found, [[SCORES[0, 0].item(), SCORES[0, 1].item(), nan], [nan, SCORES[1, 1].item(), SCORES[1, 2].item()]])
