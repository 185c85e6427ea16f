"""What a person sees: the verdicts, the tables and the picture."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from foveate.bench.cells import TEXT_POINTS, plan
from foveate.bench.chance import REASONS, chance
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.records import SPEEDUPS
from foveate.bench.run import run
from foveate.bench.statistics import beats
from foveate.bench.summary import ALL_TASKS, Mean, drops, kept_everything, means, no_better_than_random, pareto
from foveate.core.recipe import NONE
from foveate.core.statistics import wilson
from foveate.report.bench_table import TaskNote, bench_tables
from foveate.report.numbers import seconds, size
from foveate.tasks import questions


@pytest.fixture
def done(tmp_path: Path, measure: Any, log: Any) -> ResultFolder:
    folder = ResultFolder(tmp_path / "done", Settings("reference", 40, 0, "cpu", "float32", 8))
    run(
        plan(["shape", "existence"], ["hiprune", "fastv"], [0.5, 0.25]),
        lambda task: questions(task, 40, 0),
        measure,
        folder,
        log,
    )
    return folder


def shown(done: ResultFolder, width: int = 120, **more: TaskNote) -> str:
    notes = {"shape": TaskNote("cross", 0.125, below_floor=False), "existence": TaskNote("no", 0.5, below_floor=True)}
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    over_tasks, weak = means(done.records, done.pairs), no_better_than_random(done, done.records)
    notes |= more
    console.print(bench_tables(done.records, over_tasks, notes, weak, drops(done, done.records), "made up, in batches of 4"))
    return console.export_text()


def test_wilson_interval_of_a_known_case() -> None:
    assert wilson(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)


@pytest.mark.parametrize("right", [0, 10])
def test_wilson_interval_stays_inside_its_bounds_at_the_ends(right: int) -> None:
    low, high = wilson(right, 10)

    assert 0 <= low <= right / 10 <= high <= 1
    assert low < high


def test_one_lucky_question_does_not_beat_anything() -> None:
    assert not beats([1.0, 1.0, 0.0], [0.0, 1.0, 0.0])


def test_many_questions_won_and_few_lost_do() -> None:
    assert beats([1.0] * 12 + [0.0] * 2, [0.0] * 12 + [1.0] * 2)


def test_a_method_that_answers_no_better_than_random_is_found(done: ResultFolder) -> None:
    weak = no_better_than_random(done, done.records)

    assert {record.method for record in weak} == {"fastv"}
    assert len(weak) == 4


def test_a_budget_above_what_is_there_is_found(done: ResultFolder) -> None:
    whole = next(record for record in done.records if record.method == NONE)
    generous = replace(whole, method="hiprune", keep=512)

    assert kept_everything([whole, generous, replace(generous, keep=8, visual_tokens=8.0)]) == [generous]
    assert kept_everything(done.records) == []


def test_the_table_names_methods_that_kept_everything_and_those_that_need_training(done: ResultFolder) -> None:
    whole = next(record for record in done.records if (record.task, record.method) == ("shape", NONE))
    records = [whole, replace(whole, method="ppe", keep=512)]
    notes = {"shape": TaskNote("cross", 0.125, below_floor=False)}
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(
        bench_tables(records, means(records, lambda record: {name: [1.0] for name in SPEEDUPS}), notes, [], {}, "made up")
    )
    text = console.export_text()

    assert "Kept everything, as there is no more: ppe at 512" in text
    assert "ppe †" in text
    assert "† needs training: its paper trains the model with it" in text
    assert "†" not in shown(done)


def test_speed_up_is_averaged_over_tasks(done: ResultFolder) -> None:
    speedups = {(mean.method, mean.keep): mean.speedup for mean in means(done.records, done.pairs)}

    assert speedups["none", None] == pytest.approx(1)
    assert speedups["hiprune", 0.25] == pytest.approx(4)


def test_a_speed_up_has_an_interval_in_its_record_and_over_tasks(done: ResultFolder) -> None:
    record = done.record(("shape", "hiprune", "0.25"))
    mean = next(mean for mean in means(done.records, done.pairs) if (mean.method, mean.keep) == ("hiprune", 0.25))

    assert (record.speedup, record.speedup_low, record.speedup_high) == pytest.approx((4, 3.6, 4.8))
    assert 3.59 <= mean.speedup_low < mean.speedup < mean.speedup_high < 4.81
    assert (record.first_token_speedup_low, record.first_token_speedup) == (None, pytest.approx(1.6))


def test_means_leave_out_tasks_without_the_unmodified_model(done: ResultFolder) -> None:
    records = [record for record in done.records if (record.task, record.method) != ("shape", "none")]

    existence = [record for record in records if record.task == "existence"]
    assert means(records, done.pairs) == means(existence, done.pairs)


def test_the_interval_of_what_is_retained_puts_those_of_the_tasks_together(done: ResultFolder) -> None:
    rows = [record for record in done.records if record.key[1:] in (("hiprune", "0.25"), ("none", ""))]
    one, both = ({mean.method: mean for mean in means(part, done.pairs)} for part in (rows[:2], rows))

    record = next(record for record in rows[:2] if record.method == "hiprune")
    # Of one task it is the interval of the score in another unit.
    ends = (record.score_low / 0.9, record.score_high / 0.9)
    assert (one["hiprune"].retention_low, one["hiprune"].retention_high) == pytest.approx(ends)
    width = one["hiprune"].retention_high - one["hiprune"].retention_low
    assert both["hiprune"].retention_high - both["hiprune"].retention_low == pytest.approx(width / 2**0.5)


def test_the_table_shows_scores_intervals_and_verdicts(done: ResultFolder) -> None:
    text = shown(done)

    assert "existence · below floor · always 'no' scores 50.0 %" in text
    assert "shape · always 'cross' scores 12.5 %" in text
    assert "Not better than random beyond noise: fastv at 0.5, 0.25" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("hiprune"))
    assert " ".join(row.split()) == "hiprune 0.5 80.0 [65.2, 89.5] [0.0, 22.5] 50.0 72.0 150 ms 50.0 ms 250 ms 400 488 KiB"


def test_the_table_of_means_has_the_constant_answer_and_the_front(done: ResultFolder) -> None:
    over_tasks = shown(done).partition("mean over 2 tasks")[2]

    assert " · always the same answer scores 31.2 % · of these below floor: existence" in over_tasks
    starred = {" ".join(line.split()[:3]) for line in over_tasks.splitlines() if " * " in line and "0.25" in line}
    assert starred == {"hiprune * 0.25"}
    assert "none *" in over_tasks


def test_no_header_is_broken_inside_a_word(done: ResultFolder) -> None:
    assert not re.search(r"[a-z]-(?= |$)", shown(done).replace(" - ", ""), re.MULTILINE)
    for word in ("retained", "evidence", "limit"):
        assert word in shown(done)


def test_the_table_of_costs_has_paired_speed_ups_with_intervals(done: ResultFolder) -> None:
    costs = shown(done).partition("the same: cost")[2]

    row = next(line for line in costs.splitlines() if line.strip().startswith("hiprune *"))
    assert re.fullmatch(
        r"hiprune \* 0.25 1.60x \[1.60, 1.60\] 4.00x \[3.\d\d, 4.\d\d\] 1.33x .* 400 0.95", " ".join(row.split())
    )


def test_a_model_at_chance_is_said_first_and_why(done: ResultFolder) -> None:
    plain = done.record(("shape", "none", ""))
    found = chance("shape", [0.0] * 40, "cross", [0.0] * 39 + [1.0], [replace(done.answers(plain)[-1], prediction="a dot")])
    text = shown(done, shape=TaskNote("cross", 0.025, below_floor=False, chance=found))

    head, _, rest = text.partition("made up, in batches of 4")
    assert "does no better than always saying the same" in head
    assert "shape: 0.0 % of 40 questions; always 'cross' scores 2.5 %" in head
    assert "it said 'a dot'; right is " in head
    assert all(reason.split(":")[0] in head for reason in REASONS)
    assert "shape · always 'cross' scores 2.5 % · the model does no better than that" in rest


def test_a_model_that_knows_the_task_is_not_at_chance() -> None:
    assert chance("shape", [1.0] * 30 + [0.0] * 10, "cross", [1.0] * 5 + [0.0] * 35) is None
    assert chance("shape", [0.0] * 40, "", [0.0] * 40) is not None


def test_wide_numbers_and_long_recipes_fit_into_120_columns(done: ResultFolder) -> None:
    method = "hiprune(alpha=0.2) + fastv(layer=4, keep=0.5)"
    for record in [record for record in done.records if record.method == "hiprune"]:
        old = done._details_path(record.key)
        old.rename(done._details_path((record.task, method, str(record.keep))))
    done.records = [
        replace(
            record,
            method=method if record.method == "hiprune" else record.method,
            score_low=1.0,
            score_high=1.0,
            score=1.0,
            evidence_recall=1.0,
            first_token_seconds=0.0123,
            prefill_seconds=0.0123,
            total_seconds=0.0123,
            decode_seconds=0.00123,
            visual_tokens=2880.0,
        )
        for record in done.records
    ]
    text = shown(done)

    assert "…" not in text
    assert "12.3 ms 12.3 ms 12.3 ms 3252" in " ".join(text.split())


def test_drops_are_paired_by_cell_and_over_all_tasks(done: ResultFolder) -> None:
    found = drops(done, done.records)

    assert found["shape", "hiprune", "0.5"].mean == pytest.approx(0.1)
    assert found["shape", "random", "0.5"].low > 0.2
    over_tasks = found[ALL_TASKS, "hiprune", "0.5"]
    assert over_tasks.mean == pytest.approx(0.1)
    assert over_tasks.high - over_tasks.low < found["shape", "hiprune", "0.5"].high - found["shape", "hiprune", "0.5"].low
    assert not any(method == "none" for _, method, _ in found)


def test_drops_are_unknown_without_the_unmodified_model(done: ResultFolder) -> None:
    assert drops(done, [record for record in done.records if record.method != "none"]) == {}


def point(speedup: float, retention: float | None, tasks: int = 2) -> Mean:
    return Mean("made up", None, tasks, 0.5, retention, None, None, speedup, None, None)


def test_the_front_is_what_no_other_beats() -> None:
    plain, fast, both, beaten = point(1, 1.0), point(4, 0.5), point(3, 0.9), point(2.9, 0.9)

    assert pareto([plain, fast, beaten, both]) == [plain, fast, both]


def test_points_that_are_equal_are_on_the_front_together() -> None:
    assert len(pareto([point(2, 0.9), point(2, 0.9)])) == 2


def test_means_that_do_not_compare_are_not_on_the_front() -> None:
    assert pareto([point(1, 1.0), point(9, 1.0, tasks=1), point(9, None)]) == [point(1, 1.0)]
    assert pareto([]) == []


@given(st.lists(st.tuples(st.floats(0.1, 10), st.floats(0, 1)), min_size=1, max_size=12))
def test_what_is_off_the_front_is_beaten_by_something_on_it(points: list[tuple[float, float]]) -> None:
    every = [point(*each) for each in points]
    front = pareto(every)

    assert front
    for each in every:
        beaten = any(other.speedup >= each.speedup and other.retention >= each.retention for other in front)
        assert beaten or each in front


def test_undefined_numbers_are_dashes(done: ResultFolder) -> None:
    row = next(line for line in shown(done).splitlines() if line.strip().startswith("random"))

    assert "–" in row.split()[-4:]


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0.00 s"), (3.2e-5, "32.0 µs"), (0.1234, "123 ms"), (2.0, "2.00 s")]
)
def test_seconds_have_three_digits(value: float | None, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (512, "512 B"), (1024, "1.00 KiB"), (3 * 2**30, "3.00 GiB")])
def test_sizes_have_three_digits(value: float | None, text: str) -> None:
    assert size(value) == text


def test_methods_of_the_cache_compare_with_random_entries(folder: ResultFolder, measure: Any, log: Any) -> None:
    cells = plan(["shape"], ["hiprune", "fastv"], [0.5], TEXT_POINTS)
    run(cells, lambda task: questions(task, 40, 0), measure, folder, log)

    assert [record.method for record in no_better_than_random(folder, folder.records)] == ["fastv"]
