"""Text from end to end: facts that hide in a passage, a list to look things up in, a conversation about a passage.

A passage is made of sentences in which nothing is asked about, with facts about people between them. Everything stands in
the first prompt, with its question behind it, so that what compresses a prompt knows the question, as methods that look at
the last rows of a prompt expect. Only the later questions of a conversation come after.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .board import choose, distinct
from .question import Question, Turn

WHO = (
    "the baker", "the old sailor", "a young teacher", "the postman", "our neighbour", "the gardener", "a tall stranger",
    "the librarian", "the mayor", "a quiet child", "the painter", "the shopkeeper", "a tired traveller", "the blacksmith",
)  # fmt: skip
DID = (
    "walked to", "looked at", "waited near", "talked about", "returned to", "remembered", "stood beside", "wrote about",
    "passed", "admired", "asked about", "rested near",
)  # fmt: skip
WHAT = (
    "the market", "the river", "the old bridge", "the station", "the church tower", "the library", "the garden wall",
    "the harbour", "the school", "the windmill", "the narrow street", "the orchard",
)  # fmt: skip
WHEN = (
    "in the morning", "after the rain", "before dinner", "on a cold evening", "without a word", "for a long time",
    "with great care", "during the holidays", "on Sunday", "at noon", "as the bells rang", "in spite of the wind",
)  # fmt: skip
NAMES = (
    "Anna", "Boris", "Clara", "David", "Elena", "Felix", "Greta", "Henry", "Irene", "Jacob", "Karen", "Louis", "Maria",
    "Nathan", "Olivia", "Peter", "Rosa", "Simon", "Teresa", "Victor", "Walter", "Sophie", "Martin", "Laura",
)  # fmt: skip
CITIES = (
    "Paris", "London", "Berlin", "Rome", "Madrid", "Vienna", "Cairo", "Tokyo", "Moscow", "Lisbon", "Dublin", "Oslo",
    "Boston", "Chicago", "Sydney", "Toronto",
)  # fmt: skip
THINGS = (
    "lamp", "table", "violin", "kettle", "bicycle", "camera", "sofa", "mirror", "clock", "ladder", "basket", "hammer",
    "umbrella", "piano", "candle", "blanket",
)  # fmt: skip

NEEDLE, NEEDLES, DIALOGUE = 40, 20, 20
"""Sentences around the facts."""
FACTS, TURNS = 4, 3
"""Facts in a passage with several, and questions of a conversation."""
ENTRIES = 8
"""Lines of a list."""


@dataclass(frozen=True)
class Fact:
    """What a passage says of a person, the question about it, and its answer."""

    says: str
    asks: str
    answer: str


def _city(rng: np.random.Generator, name: str) -> Fact:
    city = choose(rng, CITIES)
    return Fact(f"{name} lives in {city}.", f"In which city does {name} live?", city)


def _number(what: str) -> Callable[[np.random.Generator, str], Fact]:
    def fact(rng: np.random.Generator, name: str) -> Fact:
        number = _digits(rng)
        return Fact(f"The {what} of {name} is {number}.", f"What is the {what} of {name}?", number)

    return fact


KINDS = (_city, _number("special magic number"), _number("phone number"), _number("door code"))
"""What facts are about. None is a thing that a small model would rather guess than read, as pets and jobs are."""


def needle(rng: np.random.Generator) -> tuple[Turn, ...]:
    """One fact in a long passage."""
    fact = KINDS[int(rng.integers(len(KINDS)))](rng, choose(rng, NAMES))
    return _about(_passage(rng, NEEDLE, [fact]), [fact])


def needles(rng: np.random.Generator) -> tuple[Turn, ...]:
    """Facts of four kinds about four people; one of them is asked for."""
    facts = _facts(rng)
    return _about(_passage(rng, NEEDLES, facts), [facts[int(rng.integers(FACTS))]])


def lookup(rng: np.random.Generator) -> tuple[Turn, ...]:
    """The price of one of the things on a list."""
    prices = [_digits(rng) for _ in range(ENTRIES)]
    things = distinct(rng, THINGS, ENTRIES)
    lines = [f"The price of the {thing} is {price}." for thing, price in zip(things, prices)]
    asked = int(rng.integers(ENTRIES))
    fact = Fact(lines[asked], f"What is the price of the {things[asked]}?", prices[asked])
    return _about("\n".join(("Here are the prices in our shop.", *lines)), [fact])


def dialogue(rng: np.random.Generator) -> tuple[Turn, ...]:
    """Facts of four kinds about four people, and a conversation that asks for three of them, one after the other."""
    facts = _facts(rng)
    return _about(_passage(rng, DIALOGUE, facts), distinct(rng, facts, TURNS))


def _facts(rng: np.random.Generator) -> list[Fact]:
    """One of each kind, in any order."""
    people = distinct(rng, NAMES, FACTS)
    return [kind(rng, name) for kind, name in zip(distinct(rng, KINDS, FACTS), people)]


def _digits(rng: np.random.Generator) -> str:
    return str(rng.integers(1000, 10000))


def _sentence(rng: np.random.Generator) -> str:
    who = choose(rng, WHO)
    return f"{who[0].upper()}{who[1:]} {choose(rng, DID)} {choose(rng, WHAT)} {choose(rng, WHEN)}."


def _passage(rng: np.random.Generator, sentences: int, facts: Sequence[Fact]) -> str:
    """The facts in their order at any places between sentences, never at the very end."""
    told = [_sentence(rng) for _ in range(sentences)]
    places = sorted(int(place) for place in rng.choice(sentences, len(facts), replace=False))
    for number, (place, fact) in enumerate(zip(places, facts)):
        told.insert(place + number, fact.says)
    return " ".join(told)


def _about(text: str, facts: Sequence[Fact]) -> tuple[Turn, ...]:
    """The text with the first question behind it, then the others."""
    return tuple(
        Turn(f"{text}\n\n{fact.asks}" if number == 0 else fact.asks, (fact.answer,)) for number, fact in enumerate(facts)
    )


PASSAGES: dict[str, Callable[[np.random.Generator], tuple[Turn, ...]]] = {
    "text-needle": needle,
    "text-needles": needles,
    "text-lookup": lookup,
    "text-dialogue": dialogue,
}
"""The tasks without pictures."""

MAX_NEW_TOKENS = 16
"""A sentence with the answer in it."""


def ask(task: str, rng: np.random.Generator) -> Question:
    """One question of a task, or one conversation; an answer is right that holds what was asked for."""
    return Question(task, (), PASSAGES[task](rng), "contains", MAX_NEW_TOKENS)
