"""A claim is run without and with its recipe; what is measured stands beside it with an interval."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.bench.claims import Claim
from foveate.bench.reproduce import Generated, Ran, Setup, compared, question_scores, reproduce
from foveate.bench.statistics import retained
from foveate.core.errors import FoveateError

SETUP = Setup("cpu", "float32", 4)
CLAIM = Claim("reference", "uniform(keep=0.25)", ("shape", "color"), tokens=36, of=144, kept=90.0)


class MadeUp:
    """Answers everything without a recipe, half with one."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []

    def __call__(self, model: str, recipe: str, benchmark: str, limit: int | None) -> Ran:
        self.asked.append((recipe, benchmark))
        n = limit or 10
        half = recipe != "none"
        return Ran([1.0] * (n // 2) + [float(not half)] * (n - n // 2), 36.0 if half else 144.0, 0.5 if half else 1.0)


def test_what_is_measured_stands_beside_the_claim(tmp_path: Path) -> None:
    found = reproduce(CLAIM, MadeUp(), tmp_path, SETUP, limit=40)

    assert found.kept == 50.0
    assert 30 < found.low < 50 < found.high < 70
    assert (found.n, found.tokens, found.of, found.prefill_speedup) == (80, 36.0, 144.0, 2.0)
    assert found.verdict == "less is kept than claimed"
    written = json.loads((tmp_path / "reproduction.json").read_text())
    assert written["kept"] == 50.0
    assert written["claim"]["kept"] == 90.0
    assert written["verdict"] == found.verdict


def test_finished_runs_are_not_made_again(tmp_path: Path) -> None:
    class Dies(MadeUp):
        def __call__(self, model: str, recipe: str, benchmark: str, limit: int | None) -> Ran:
            if len(self.asked) == 3:
                raise KeyboardInterrupt
            return super().__call__(model, recipe, benchmark, limit)

    with pytest.raises(KeyboardInterrupt):
        reproduce(CLAIM, Dies(), tmp_path, SETUP)
    rest = MadeUp()
    reproduce(CLAIM, rest, tmp_path, SETUP, resume=True)

    assert rest.asked == [("uniform(keep=0.25)", "color")]


def test_runs_of_another_claim_are_refused(tmp_path: Path) -> None:
    reproduce(CLAIM, MadeUp(), tmp_path, SETUP)

    with pytest.raises(FoveateError, match="is not empty; --resume"):
        reproduce(CLAIM, MadeUp(), tmp_path, SETUP)
    with pytest.raises(FoveateError, match=r"^limit=5: .*cannot be mixed"):
        reproduce(CLAIM, MadeUp(), tmp_path, SETUP, limit=5, resume=True)


def test_a_claim_without_benchmarks_is_refused_before_any_run(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"does not name its benchmarks; name some with --tasks"):
        reproduce(Claim("reference", "fastv", kept=90.0), MadeUp(), tmp_path / "out", SETUP)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("said", "verdict"), [(50.0, "as claimed"), (5.0, "more is kept than claimed")])
def test_the_verdict_goes_by_the_interval(said: float, verdict: str) -> None:
    pair = (Ran([1.0] * 40, 1.0, 1.0), Ran([1.0, 0.0] * 20, 1.0, 1.0))

    assert compared(Claim("reference", "fastv", ("shape",), kept=said), [pair]).verdict == verdict
    assert compared(Claim("reference", "fastv", ("shape",), speedup={"prefill": 2}), [pair]).verdict == "claims no score"


def test_what_is_kept_is_the_mean_of_the_benchmarks_shares() -> None:
    found = retained([([1, 0, 0, 0], [1, 1, 0, 0]), ([1, 1], [1, 1])])

    assert found.value == 0.75
    assert found.low is not None
    assert found.low < 0.75 < (found.high or 0)


def test_nothing_to_keep_is_refused() -> None:
    with pytest.raises(FoveateError, match="the unmodified model scores 0"):
        retained([([0.0], [0.0])])


def sample(number: int, **metrics: Any) -> dict[str, Any]:
    return {"doc_id": number, **metrics}


@pytest.mark.parametrize(
    ("metrics", "samples", "scores"),
    [
        ({"exact_match,none": 0.5}, [sample(1, exact_match=0.0), sample(0, exact_match=1.0)], [1.0, 0.0]),
        ({"pope_accuracy,none": 1.0, "pope_accuracy_stderr,none": 0}, [sample(0, pope_accuracy={"score": 1.0})], [1.0]),
        ({"submission,none": 0, "anls,none": 0.5}, [sample(0, submission={"answer": "a"}, anls=0.5)], [0.5]),
    ],
)  # fmt: skip
def test_scores_are_read_from_what_lmms_eval_gives(metrics: Any, samples: Any, scores: list[float]) -> None:
    assert question_scores("it", {"results": {"it": metrics}, "samples": {"it": samples}}) == scores


def test_answers_that_are_judged_together_are_refused_by_name() -> None:
    found = {"results": {"it": {"judged,none": 1}}, "samples": {"it": [sample(0, judged={"answer": "a"})]}}

    with pytest.raises(FoveateError, match=r"tasks='it': lmms-eval gives no score of each question of it"):
        question_scores("it", found)


def test_a_claim_about_a_reference_model_runs_on_a_generated_task(tmp_path: Path) -> None:
    claim = Claim("reference", "uniform(keep=0.25)", ("shape",), kept=90.0)

    found = reproduce(claim, Generated(SETUP), tmp_path, SETUP, limit=8)

    assert found.n == 8
    assert found.tokens == 36
    assert found.of == 144
    assert found.low <= found.kept <= found.high
