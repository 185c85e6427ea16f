"""`benchmarks/parity.py`, but for the engines: what it keeps of parts, and which questions come next."""

from __future__ import annotations

import json

from benchmarks import parity

PART = {"model": "reference", "recipe": "a", "questions": 50, "answers_equal": 49, "kept_equal": 48, "logprob_gap": 2e-6}


def test_parts_add_up_and_are_found_again(tmp_path):
    kept = parity.Kept(tmp_path / "parity.json", again=False)
    kept.add(PART | {"score_gaps": []})
    kept.add(PART | {"model": "reference-qwen", "score_gaps": []})
    kept.add(PART | {"score_gaps": [0.5, None], "logprob_gap": 1e-6, "float64_equal": 47, "float64_of": 50})
    again = parity.Kept(kept.path, again=False)
    assert again.records == kept.records == json.loads(kept.path.read_text())["records"]
    whole = {"questions": 100, "answers_equal": 98, "kept_equal": 96, "score_gaps": [0.5, None], "logprob_gap": 2e-6}
    assert again.of("reference", "a") == PART | whole | {"float64_equal": 47, "float64_of": 50}
    assert "| reference | `a` | 96 of 100 | 5.0e-01 | 47 of 50 | 98 of 100 | 2.0e-06 |" in parity._markdown(
        again.run, again.records
    )
    assert parity.Kept(kept.path, again=True).records == []


def test_a_longer_run_begins_with_the_questions_of_a_shorter_one():
    few, many = parity.asked_of("reference-qwen", 9), parity.asked_of("reference-qwen", 20)
    assert [each.prompt for each in many[:9]] == [each.prompt for each in few]
    assert len({each.task for each in few[:6]}) == 6
