"""Every metric gives a number in 0..1, the answer itself is right, and the known cases come out as published."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from foveate.core.errors import FoveateError
from foveate.tasks import metrics
from foveate.tasks.metrics import BOXED, METRICS, anls, as_box, box, contains, metric, overlap, point, words
from foveate.tasks.vqa import normalise, vqa

TEXTS = st.text(max_size=30)
COORDINATES = st.integers(0, 50)


@st.composite
def boxes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    x0, y0 = draw(COORDINATES), draw(COORDINATES)
    return x0, y0, x0 + draw(st.integers(1, 50)), y0 + draw(st.integers(1, 50))


def written(numbers: object) -> str:
    return str(numbers)[1:-1]


@pytest.mark.parametrize("name", [name for name in METRICS if name not in BOXED])
@given(said=TEXTS, answers=st.lists(TEXTS, min_size=1, max_size=10))
def test_scores_are_in_their_range_whatever_the_order_of_the_answers(name: str, said: str, answers: list[str]) -> None:
    score = metric(name)(said, answers)

    assert 0 <= score <= 1
    assert metric(name)(said, answers[::-1]) == pytest.approx(score)


@pytest.mark.parametrize("name", [name for name in METRICS if name not in BOXED])
@given(answer=TEXTS)
def test_the_answer_itself_is_right(name: str, answer: str) -> None:
    assume([word for word in words(answer) if word.isalnum()])

    assert metric(name)(answer, [answer]) == 1


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("It is a RED star.", ["red star"], 1),
        ("covered", ["red"], 0),
        ("red, big star", ["red star"], 0),
        ("anything", [""], 0),
        ("12.50", ["12"], 1),
    ],
)
def test_contains_looks_for_whole_words(said: str, answers: list[str], score: float) -> None:
    assert contains(said, answers) == score


@pytest.mark.parametrize(
    ("said", "answers", "score"),
    [
        ("hello", ["hello"], 1),
        ("Hello  World", ["hello world"], 1),
        ("helo", ["hello"], 0.8),
        ("kitten", ["sitting"], 1 - 3 / 7),
        ("ab", ["ac"], 0),
        ("cat", ["hello", "cart"], 0.75),
        ("", ["hello"], 0),
        ("", [""], 1),
    ],
)
def test_anls_of_known_cases(said: str, answers: list[str], score: float) -> None:
    assert anls(said, answers) == pytest.approx(score)


@given(TEXTS, TEXTS)
def test_anls_does_not_care_which_is_the_answer(one: str, other: str) -> None:
    assert anls(one, [other]) == anls(other, [one])


@given(st.text("abc", min_size=1, max_size=20), st.data())
def test_anls_of_one_edit_is_one_letter_less(text: str, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(text)))

    longer = text[:at] + "x" + text[at:]
    assert anls(longer, [text]) == (pytest.approx(1 - 1 / len(longer)) if len(longer) > 2 else 0)


@pytest.mark.parametrize(("matches", "score"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_vqa_accuracy_of_ten_answers_is_the_official_one(matches: int, score: float) -> None:
    assert vqa("red", ["red"] * matches + ["blue"] * (10 - matches)) == pytest.approx(score)


@pytest.mark.parametrize(("answers", "score"), [(["red"], 1), (["red", "red"], 1), (["red", "blue"], 0.5), (["blue"], 0)])
def test_vqa_accuracy_is_defined_for_fewer_answers(answers: list[str], score: float) -> None:
    assert vqa("red", answers) == score


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Red Car.", "red car"),
        ("An apple, a pear!", "apple pear"),
        ("two", "2"),
        ("None", "0"),
        ("1,000", "1000"),
        ("3.5 m", "3.5 m"),
        ("yes/no", "yes no"),
        ("t-shirt", "t shirt"),
        ("don't", "dont"),
        (" new\nline ", "new line"),
    ],
)
def test_vqa_answers_are_normalised_as_in_the_official_evaluation(text: str, plain: str) -> None:
    assert normalise(text) == plain


@given(boxes(), st.data())
def test_a_point_is_right_inside_its_box_only(found: tuple[int, int, int, int], data: st.DataObject) -> None:
    x, y = data.draw(st.integers(-10, 110)), data.draw(st.integers(-10, 110))

    inside = found[0] <= x <= found[2] and found[1] <= y <= found[3]
    assert point(f"click ({x}, {y}) now", [written(found)]) == inside


@given(boxes())
def test_a_box_overlaps_itself(found: tuple[int, int, int, int]) -> None:
    assert overlap(found, found) == 1
    assert box(f"[{written(found)}]", [written(found)]) == 1


@given(boxes(), boxes())
def test_overlap_is_symmetric_and_at_most_one(one: tuple[int, int, int, int], other: tuple[int, int, int, int]) -> None:
    assert 0 <= overlap(one, other) == overlap(other, one) <= 1


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("0 0 10 5", 1),
        ("0 0 10 4", 0),
        ("x0=0, y0=0, x1=10, y1=10", 0),
        ("0.0,0.0,9.5,9.5", 1),
        ("10 10 0 0", 0),
        ("0 0 10", 0),
        ("", 0),
    ],
)
def test_boxes_of_known_overlap(said: str, score: float) -> None:
    assert box(said, ["0 0 10 10"]) == score


def test_a_hyphen_between_numbers_is_no_sign() -> None:
    assert point("5-7", ["0 0 10 10"]) == 1
    assert point("-5 7", ["0 0 10 10"]) == 0


@pytest.mark.parametrize("answer", ["red", "1 2 3", "5 5 1 1", "1 2 3 4 5"])
def test_an_answer_that_is_no_box_is_refused(answer: str) -> None:
    with pytest.raises(FoveateError, match="must be a box"):
        as_box(answer)


def test_an_unknown_metric_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(FoveateError, match=r"metric='bleu': must be one of exact, contains, .*box"):
        metric("bleu")


OWN = """
def half(prediction, answers):
    return 0.5 if prediction in answers else 0

def percent(prediction, answers):
    return 100

def nothing(prediction, answers):
    pass

def broken(prediction, answers):
    return 1 / len(prediction)

half.again = half
constant = 0.5
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module with metrics, in the working directory and nowhere else, and a package that declares one of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_metrics.py").write_text(OWN)
    package = tmp_path / "my_metrics-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: my-metrics\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[foveate.metrics]\nhalf = my_metrics:half\n")
    metrics._own.cache_clear()
    yield "my_metrics"
    metrics._own.cache_clear()
    sys.modules.pop("my_metrics", None)


@pytest.mark.parametrize("name", ["half", "half.again"])
def test_a_function_of_the_working_directory_is_a_metric(own: str, name: str) -> None:
    score = metric(f"{own}:{name}")

    assert [score("a", ["a", "b"]), score("c", ["a", "b"])] == [0.5, 0]


def test_a_package_offers_a_metric_by_an_entry_point(own: str) -> None:
    sys.path.append(str(Path.cwd()))

    assert metric("half")("a", ["a"]) == 0.5
    with pytest.raises(FoveateError, match=r"must be one of exact, .*, box, half, or a function of your own"):
        metric("bleu")


def test_a_name_that_two_packages_offer_is_refused(own: str) -> None:
    points = Path("other-1.0.dist-info/entry_points.txt")
    points.parent.mkdir()
    points.write_text("[foveate.metrics]\nhalf = other:half\n")
    (points.parent / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    sys.path.append(str(Path.cwd()))

    with pytest.raises(FoveateError, match=r"metric='half': is offered by several packages; .*my_metrics:half"):
        metric("half")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("absent", r"cannot be imported \(AttributeError: module 'my_metrics' has no attribute 'absent'\)"),
        ("constant", "is float; must be a function"),
        ("percent", r"gave 100 for the prediction 'a'; must be a number in \[0, 1\]"),
        ("nothing", "gave None for the prediction 'a'; must be a number"),
        ("broken", "failed on the prediction '' .ZeroDivisionError: division by zero"),
    ],
)
def test_a_metric_that_is_none_is_named(own: str, name: str, message: str) -> None:
    with pytest.raises(FoveateError, match=rf"^metric='my_metrics:{name}': {message}"):
        metric(f"{own}:{name}")("" if name == "broken" else "a", ["a"])


def test_a_module_that_is_not_there_is_named() -> None:
    with pytest.raises(FoveateError, match=r"metric='absent_module:f': cannot be imported \(ModuleNotFoundError"):
        metric("absent_module:f")


def test_anls_without_its_library_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rapidfuzz.distance.Levenshtein", None)

    with pytest.raises(FoveateError, match=r"pip install 'foveate\[data\]'"):
        anls("a", ["a"])


def test_the_metric_of_the_page_on_own_data_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (code,) = (block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def within_a_percent" in block)
    (tmp_path / "metrics_of_the_page.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)

    score = metric("metrics_of_the_page:within_a_percent")
    assert [score(said, ["12.50", "3"]) for said in ("$12.45", "3", "13", "twelve")] == [1, 1, 0, 0]
