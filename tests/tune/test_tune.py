from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveate.bench.probes import Hints
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.tunable import Range
from foveate.tune import search, space
from foveate.tune.goal import DROP, Goal
from foveate.tune.run import spread
from tests.tune.conftest import Log, MadeUp, Tune, goal, refuse, stream


def test_the_fastest_recipe_within_the_bound_is_found(tuned: Tune) -> None:
    found = tuned(aim=goal(bound=0.1))

    (method,) = found.recipe.methods
    # hiprune loses 5 % of what it drops.
    assert method.name == "hiprune"
    assert method.keep < 0.2
    assert found.winner is not None
    assert found.winner.kept
    assert found.winner.evidence.n == 500
    assert found.winner.evidence.drop.value <= 0.1


def test_the_best_recipe_within_a_budget_is_found(tuned: Tune) -> None:
    found = tuned(aim=goal(target=DROP, bounded="kv", bound=0.3))

    (method,) = found.recipe.methods
    assert method.name == "hiprune"
    assert method.keep <= 0.3


def test_hopeless_trials_answer_few_questions(tuned: Tune) -> None:
    answer = MadeUp()

    found = tuned(answer)

    pruned = [each for each in found.tried if each.outcome == "pruned"]
    assert len(pruned) > 5
    assert all(each.evidence is not None and each.evidence.n < 400 for each in pruned)
    assert all(each.why for each in pruned)
    assert sum(n for recipe, n in answer.calls if recipe.startswith("random(keep=0.5)")) == 50


def test_the_unmodified_model_answers_every_question_once(tuned: Tune) -> None:
    answer = MadeUp()

    found = tuned(answer)

    assert sum(n for recipe, n in answer.calls if recipe == "none") == 400 + 500 * len(found.looks)


def test_a_promise_that_breaks_sends_the_next_to_fresh_questions(tuned: Tune) -> None:
    log = Log()

    found = tuned(MadeUp(luck=0.03), aim=goal(bound=0.02), watcher=log)

    broken = [look for look in found.looks if not look.kept]
    assert broken
    assert [look.start for look in found.looks] == [500 * number for number in range(len(found.looks))]
    assert log.validated[: len(found.looks)] == [look.recipe for look in found.looks]
    assert found.winner is None or found.winner.evidence.drop.value <= 0.02


def test_where_no_promise_holds_the_model_is_left_as_it_is(tuned: Tune, tmp_path: Path) -> None:
    found = tuned(MadeUp(luck=1.0), aim=goal(bound=0.0), methods=("random", "uniform"))

    assert found.looks
    assert found.winner is None
    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == Recipe()
    assert json.loads((tmp_path / "out" / "evidence.json").read_text())["kept"] is False


def test_validation_ends_where_the_held_out_questions_end(tuned: Tune) -> None:
    found = tuned(MadeUp(luck=1.0), aim=goal(bound=0.0), held=stream("held", most=300))

    assert [look.evidence.n for look in found.looks] == [500, 100]


def test_the_winner_stands_beside_the_baselines_at_its_cost(tuned: Tune) -> None:
    found = tuned()

    assert found.winner is not None
    for baseline in found.baselines:
        assert baseline.evidence.shares["prefill"].value == pytest.approx(
            found.winner.evidence.shares["prefill"].value, rel=0.06
        )
        assert baseline.beaten
    assert [baseline.recipe.partition("(")[0] for baseline in found.baselines] == ["random", "uniform"]


def test_a_smaller_picture_stands_beside_the_winner_where_there_is_one(tuned: Tune) -> None:
    def no_picture(recipe: Recipe) -> None:
        if any(method.name == "downsample" for method in recipe.methods):
            raise FoveateError("downsample: the model makes more of any smaller one")

    found = tuned(MadeUp(before=no_picture), methods=("hiprune", "random", "uniform", "downsample", "pool"))

    assert found.winner is not None
    assert "hiprune" in found.winner.recipe
    assert [baseline.recipe.partition("(")[0] for baseline in found.baselines] == ["random", "uniform", "pool"]
    assert "most=" in found.baselines[-1].recipe


def test_a_baseline_that_wins_is_compared_with_the_other_and_does_not_beat_it(tuned: Tune) -> None:
    found = tuned(aim=goal(bound=0.2), methods=("random", "uniform"))

    assert found.recipe.methods[0].name == "uniform"
    assert [baseline.recipe.partition("(")[0] for baseline in found.baselines] == ["random"]


def test_what_refuses_or_crashes_is_said_and_the_rest_goes_on(tuned: Tune) -> None:
    def crash(recipe: Recipe) -> None:
        refuse("scope")(recipe)
        if any(method.name == "snapkv" for method in recipe.methods):
            raise RuntimeError("out of\npaper")

    found = tuned(MadeUp(before=crash), trials=8, methods=("hiprune", "scope", "snapkv"))

    assert {(each.outcome, each.why) for each in found.tried if each.outcome in ("refused", "failed")} == {
        ("refused", "scope: not on this model; use another"),
        ("failed", "RuntimeError: out of paper"),
    }
    assert found.recipe.methods[0].name == "hiprune"


def test_an_interrupted_tune_goes_on_as_if_it_had_not_been(tuned: Tune) -> None:
    class Killed(BaseException):
        pass

    def kill_at(limit: int) -> MadeUp:
        answer = MadeUp()

        def before(recipe: Recipe) -> None:
            if len(answer.calls) == limit:
                raise Killed

        answer.before = before
        return answer

    before, after = kill_at(17), MadeUp()
    with pytest.raises(Killed):
        tuned(before)
    found = tuned(after, resume=True)

    numbers = [each.number for each in found.tried]
    assert len(numbers) == 20
    assert len(set(numbers)) == 20
    finished_before = {recipe for recipe, _ in before.calls[:-1]} - {"none", before.calls[-1][0]}
    validated = {look.recipe for look in found.looks} | {each.recipe for each in found.baselines}
    assert not finished_before & {recipe for recipe, _ in after.calls} - validated
    assert len({each.recipe for each in found.tried}) == 20


def test_a_tune_that_is_resumed_draws_what_it_would_have_drawn(tuned: Tune) -> None:
    whole = tuned(out="whole", trials=14)
    tuned(out="parts", trials=9)
    parts = tuned(out="parts", trials=14, resume=True)

    assert [each.recipe for each in parts.tried] == [each.recipe for each in whole.tried]
    assert parts.recipe == whole.recipe


def test_a_finished_validation_is_not_repeated(tuned: Tune) -> None:
    first = tuned(trials=10)
    log = Log()

    again = tuned(trials=10, resume=True, watcher=log)

    assert again.looks == first.looks
    assert log.trials == []
    assert log.validated == [baseline.recipe for baseline in first.baselines]


def test_the_search_ends_with_the_time(tuned: Tune) -> None:
    assert tuned(minutes=1e-9).tried == []


def test_a_space_that_is_used_up_ends_the_search(tuned: Tune, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(space, "KEEP", Range(0.5, 0.52))
    monkeypatch.setattr(search, "_REPEATS", 10)
    monkeypatch.setattr(Goal, "starts", (0.5,))

    found = tuned(methods=("uniform",), trials=1000)

    assert {each.recipe for each in found.tried} == {f"uniform(keep={keep})" for keep in (0.5, 0.51, 0.52)}


def test_a_folder_of_other_settings_is_refused(tuned: Tune) -> None:
    tuned(trials=2)

    with pytest.raises(FoveateError, match="--resume continues there"):
        tuned(trials=2)
    with pytest.raises(FoveateError, match="goal="):
        tuned(trials=2, aim=goal(bound=0.1), resume=True)


def test_the_evidence_lies_beside_the_recipe(tuned: Tune, tmp_path: Path) -> None:
    found = tuned(trials=10)

    assert Recipe.load(tmp_path / "out" / "recipe.yaml") == found.recipe
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert evidence["recipe"] == str(found.recipe)
    assert evidence["validation"][-1]["evidence"]["n"] == 500
    assert {"optuna", "torch"} <= set(evidence["versions"])
    tried = json.loads((tmp_path / "out" / "trials.json").read_text())
    assert [each["recipe"] for each in tried] == [each.recipe for each in found.tried]


def test_hints_are_tried_first(tuned: Tune) -> None:
    found = tuned(hints=Hints(horizon=5, dead_share=0.25), trials=2)

    assert [each.recipe for each in found.tried] == ["hiprune(keep=0.75)", "scope(keep=0.75)"]


def test_questions_are_spread_over_the_tasks() -> None:
    def ask(task: str, start: int, stop: int) -> list[str]:
        return [f"{task}{number}" for number in range(start, min(stop, 3 if task == "b" else 99))]

    assert spread(ask, ["a", "b"], 0, 5) == ["a0", "b0", "a1", "b1", "a2"]
    assert spread(ask, ["a", "b"], 5, 8) == ["b2", "a3"]
    whole = spread(ask, ["a", "b", "c"], 0, 12)
    assert [q for part in ((0, 5), (5, 12)) for q in spread(ask, ["a", "b", "c"], *part)] == whole
