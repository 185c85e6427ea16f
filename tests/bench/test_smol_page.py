"""The page of ``benchmarks.smol`` on made-up numbers: the same questions in a row, verdicts by pairs, gaps left empty."""

from __future__ import annotations

from benchmarks.smol_page import FULL, RANDOM, Measured, page

N = 30


def answers(right: int, said: str = "yes", n: int = N) -> dict[str, tuple[float, str]]:
    """Of ``n`` questions, the first ``right`` of them right."""
    return {str(number): (float(number < right), said) for number in range(n)}


def measured() -> Measured:
    return Measured(
        about={"versions": {"torch": "2"}, "tokens": {"text-needle": 300}, "keeps": [0.2, 0.1], "long": 99},
        answers={
            f"text-needle||{FULL}": answers(30),
            f"text-needle|0.2|{RANDOM}": answers(0),
            "text-needle|0.2|snapkv": answers(29),
            "text-needle|0.2|kvpress SnapKVPress": answers(28, n=N - 2),
            f"text-lookup||{FULL}": answers(10),
        },
        kv_bytes={f"|{FULL}": 1000, "0.2|snapkv": 200},
        losses={f"licence||{FULL}": 0.0, "licence|0.2|snapkv": 1.0},
        steps={f"|{FULL}": [0.1, 0.1, 0.3], "0.2|snapkv": [0.05, 0.05, 9.0]},
    )


def test_rows_are_about_the_questions_that_all_have_answered() -> None:
    lines = page(measured()).splitlines()

    assert "Questions: text-needle 28." in lines
    assert "| snapkv | 100 % (88 % to 100 %) | 2.7 | 20% |" in lines
    assert not any(line.startswith("## 10%") for line in lines)


def test_verdicts_compare_pairs() -> None:
    (line,) = [line for line in page(measured()).splitlines() if line.startswith("- `text-needle`: better")]

    assert "beyond noise: snapkv, kvpress SnapKVPress; worse: none; not to be told from the full cache: snapkv" in line


def test_what_the_model_cannot_do_is_said() -> None:
    (line,) = [line for line in page(measured()).splitlines() if line.startswith("- `text-lookup`: 33 %")]

    assert "below the floor of 50 %" in line


def test_implementations_and_steps_stand_beside_each_other() -> None:
    text = page(measured())

    assert "| snapkv | 20% | 28 of 28 | +0 (" in text
    assert "| snapkv | 20% | 20.0 | 2.00 x |" in text
