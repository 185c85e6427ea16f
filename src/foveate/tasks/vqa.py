"""VQA accuracy: how many of ten people gave the answer.

After the official evaluation (Antol et al., arXiv 1505.00468, and its published code): a prediction is fully right once
three people gave it. What differs from the code: the normalisation is always applied, not only where people disagree;
apostrophes are dropped, where the code puts them into words on a list of contractions ("dont", "don't"); and with fewer
than four answers all others must agree, so that the metric is defined for any number of them (with one it is equality).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from statistics import fmean

_ENOUGH_PEOPLE = 3
_ARTICLES = ("a", "an", "the")
_DIGITS = {
    **{"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"},
    **{"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"},
}
_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_THOUSANDS = re.compile(r"\d,\d")


def vqa(prediction: str, answers: Sequence[str]) -> float:
    """min(1, matches / 3) among the other people's answers, averaged over leaving out each person in turn."""
    said, given = normalise(prediction), [normalise(answer) for answer in answers]
    if len(given) == 1:
        return float(said == given[0])
    matches, enough = given.count(said), min(_ENOUGH_PEOPLE, len(given) - 1)
    return fmean(min(1.0, (matches - (answer == said)) / enough) for answer in given)


@lru_cache(maxsize=65536)
def normalise(text: str) -> str:
    """Lower case without articles, apostrophes and punctuation; number words up to ten as digits.

    A mark becomes a space, or nothing where it stands beside a space anywhere in the text or the text holds a comma
    between digits; a period stays before a digit.
    """
    text = " ".join(text.split())
    joined = bool(_THOUSANDS.search(text))
    plain = text
    for mark in _MARKS:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if joined or beside_space else " ")
    plain = _PERIOD.sub("", plain).replace("'", "").lower()
    return " ".join(_DIGITS.get(word, word) for word in plain.split() if word not in _ARTICLES)
