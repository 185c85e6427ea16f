"""Tasks on text alone: the answer stands in the text once, where the question says; the same seed asks the same."""

import re

import pytest

from foveate.core.errors import FoveateError
from foveate.tasks import TASKS, TEXTS, majority, question, questions
from foveate.tasks.passages import ENTRIES, FACTS, NEEDLE, NEEDLES, TURNS


@pytest.mark.parametrize("task", TEXTS)
def test_the_same_arguments_ask_the_same(task: str) -> None:
    first, second = questions(task, 4, seed=3), questions(task, 4, seed=3)
    assert [(each.prompt, each.answer) for each in first] == [(each.prompt, each.answer) for each in second]
    assert [each.prompt for each in questions(task, 2, seed=4)] != [each.prompt for each in first[:2]]


@pytest.mark.parametrize("task", TEXTS)
def test_splits_and_seeds_share_no_text(task: str) -> None:
    streams = [questions(task, 20, seed, split) for seed in (0, 1) for split in ("train", "validation", "test")]
    texts = [each.turns[0].prompt.partition("\n\n")[0] for stream in streams for each in stream]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("task", TEXTS)
def test_each_answer_follows_from_one_sentence_of_the_text(task: str) -> None:
    for each in questions(task, 20, seed=0):
        text, _, first = each.turns[0].prompt.partition("\n\n")
        assert each.images == ()
        for asked, (answer,) in [(first, each.turns[0].answers), *((turn.prompt, turn.answers) for turn in each.turns[1:])]:
            about = re.findall(r"(?:of the |of |does )(\w+)(?: live)?\?", asked)[0]
            (sentence,) = [said for said in re.split(r"(?<=\.)\s", text) if re.search(rf"\b{about}\b", said)]
            assert re.search(rf"\b{answer}\.", sentence)


def test_texts_have_the_length_that_they_say() -> None:
    def sentences(task: str) -> int:
        return question(task, 0, 0).turns[0].prompt.partition("\n\n")[0].count(".")

    assert [sentences(task) for task in TEXTS] == [NEEDLE + 1, NEEDLES + FACTS, ENTRIES + 1, NEEDLES + FACTS]


def test_a_conversation_asks_for_different_facts() -> None:
    for each in questions("text-dialogue", 20, seed=0):
        assert len({turn.prompt for turn in each.turns}) == len({turn.answers for turn in each.turns}) == TURNS


def test_an_answer_counts_within_a_sentence_and_as_a_whole_word() -> None:
    asked = question("text-lookup", 0, 0)
    (answer,) = asked.turns[0].answers
    assert asked.score([f"The price of the lamp is {answer}."]) == 1
    assert asked.score([f"{answer}0"]) == 0


def test_no_constant_answer_does_well() -> None:
    for task in TEXTS:
        constant = majority(task)
        scores = [each.score([constant] * len(each.turns)) for each in questions(task, 200, seed=0)]
        assert sum(scores) / len(scores) < 0.1


def test_texts_are_no_tasks_about_pictures() -> None:
    assert not set(TEXTS) & set(TASKS)
    with pytest.raises(FoveateError, match=r"task='text': must be one of attribute, .*, text-dialogue$"):
        question("text", 0, 0)
