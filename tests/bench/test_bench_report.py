"""What a person sees: the verdicts, the tables and the picture."""

from __future__ import annotations

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from rich.console import Console

from foveate.bench.cells import plan
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.run import run
from foveate.bench.statistics import beats
from foveate.bench.summary import ALL_TASKS, Mean, drops, kept_everything, means, no_better_than_random, pareto
from foveate.core.recipe import NONE
from foveate.core.statistics import wilson
from foveate.report.bench_table import TaskNote, bench_tables
from foveate.report.numbers import seconds, size
from foveate.report.picture import _line, _mark, draw_quality_speed
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


def shown(done: ResultFolder, width: int = 120) -> str:
    notes = {"shape": TaskNote("cross", 0.125, below_floor=False), "existence": TaskNote("no", 0.5, below_floor=True)}
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    over_tasks, weak = means(done.records, done.speedup), no_better_than_random(done, done.records)
    console.print(bench_tables(done.records, over_tasks, notes, weak, drops(done, done.records)))
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
    console.print(bench_tables(records, means(records, lambda record: 1.0), notes, [], {}))
    text = console.export_text()

    assert "Kept everything, as there is no more: ppe at 512" in text
    assert "ppe †" in text
    assert "† needs training: its paper trains the model with it" in text
    assert "†" not in shown(done)


def test_speed_up_is_averaged_over_tasks(done: ResultFolder) -> None:
    speedups = {(mean.method, mean.keep): mean.speedup for mean in means(done.records, done.speedup)}

    assert speedups["none", None] == pytest.approx(1)
    assert speedups["hiprune", 0.25] == pytest.approx(4)


def test_means_leave_out_tasks_without_the_unmodified_model(done: ResultFolder) -> None:
    records = [record for record in done.records if (record.task, record.method) != ("shape", "none")]

    existence = [record for record in records if record.task == "existence"]
    assert means(records, done.speedup) == means(existence, done.speedup)


def test_the_table_shows_scores_intervals_and_verdicts(done: ResultFolder) -> None:
    text = shown(done)

    assert "existence · below floor · always 'no' scores 50.0 %" in text
    assert "shape · always 'cross' scores 12.5 %" in text
    assert "Not better than random beyond noise: fastv at 0.5, 0.25" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("hiprune"))
    assert " ".join(row.split()) == "hiprune 0.5 80.0 [65.2, 89.5] 88.9 [0.0, 22.5] 50.0 72.0 50.0 ms 10.0 ms 0.95 488 KiB"


def test_the_table_of_means_has_the_constant_answer_and_the_front(done: ResultFolder) -> None:
    over_tasks = shown(done).partition("mean over 2 tasks")[2]

    assert " · always the same answer scores 31.2 % · of these below floor: existence" in over_tasks
    starred = {" ".join(line.split()[:3]) for line in over_tasks.splitlines() if " * " in line and "[" in line}
    assert starred == {"hiprune * 0.25"}
    assert "none *" in over_tasks


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
            prefill_seconds=0.0123,
            decode_seconds=0.0123,
            visual_tokens=2880.0,
        )
        for record in done.records
    ]
    text = shown(done)

    assert "…" not in text
    assert "12.3 ms 12.3 ms" in " ".join(text.split())


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


def test_the_picture_is_a_png_of_readable_size(done: ResultFolder, tmp_path: Path) -> None:
    draw_quality_speed(means(done.records, done.speedup), tmp_path / "picture.png", "made up")

    with Image.open(tmp_path / "picture.png") as picture:
        assert picture.format == "PNG"
        assert picture.width >= 1000


def test_the_picture_grows_with_its_legend_and_settings_of_one_method_share_a_line(
    done: ResultFolder, tmp_path: Path
) -> None:
    (plain,) = (mean for mean in means(done.records, done.speedup) if mean.method == NONE)
    methods = [f"method{number}" for number in range(40)]
    settings = [f"shortv(frozen=0.{number})" for number in range(40)]
    for name, recipes in {"many": methods, "one": settings}.items():
        rows = [plain, *(replace(plain, method=recipe, speedup=2.0) for recipe in recipes)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            draw_quality_speed(rows, tmp_path / f"{name}.png", name)

    with Image.open(tmp_path / "many.png") as many, Image.open(tmp_path / "one.png") as one:
        assert many.height > 1.8 * one.height


@pytest.mark.parametrize(
    ("method", "keep", "line", "mark"),
    [
        ("hiprune", 0.5, "hiprune", "0.5"),
        ("hiprune(alpha=0.2)", 0.5, "hiprune(alpha=0.2)", "0.5"),
        ("shortv", None, "shortv", ""),
        ("shortv(frozen=0.4)", None, "shortv", "frozen=0.4"),
        ("shortv(frozen=0.4) + fastv(keep=0.5)", None, "shortv(frozen=0.4) + fastv(keep=0.5)", ""),
    ],
)
def test_a_point_is_marked_with_what_its_line_does_not_say(method: str, keep: float | None, line: str, mark: str) -> None:
    mean = replace(point(2, 0.9), method=method, keep=keep)

    assert (_line(mean), _mark(mean)) == (line, mark)


def test_a_picture_without_a_single_point_is_still_drawn(tmp_path: Path) -> None:
    draw_quality_speed([], tmp_path / "picture.png", "nothing")

    assert (tmp_path / "picture.png").is_file()


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0.00 s"), (3.2e-5, "32.0 µs"), (0.1234, "123 ms"), (2.0, "2.00 s")]
)
def test_seconds_have_three_digits(value: float | None, text: str) -> None:
    assert seconds(value) == text


@pytest.mark.parametrize(("value", "text"), [(None, "–"), (512, "512 B"), (1024, "1.00 KiB"), (3 * 2**30, "3.00 GiB")])
def test_sizes_have_three_digits(value: float | None, text: str) -> None:
    assert size(value) == text
