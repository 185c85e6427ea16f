"""A method whose paper trains the model says so, once, and can be told not to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest

import foveate
from foveate.engine.check import warn_untrained
from tests.suite.bodies import BODIES


@pytest.fixture
def model() -> Iterator[Any]:
    """A model of four layers, in a process that has said nothing yet."""
    warn_untrained.cache_clear()
    yield BODIES["llava-clip"].model()
    warn_untrained.cache_clear()


def test_it_is_said_once_by_name_and_where_attach_was_called(model: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            foveate.attach(model, "hidrop").detach()

    (warning,) = caught
    assert warning.category is foveate.NeedsTraining
    assert str(warning.message).startswith("hidrop: needs training: the models of its paper were trained with this schedule")
    assert warning.filename == __file__


def test_methods_for_models_as_they_are_say_nothing(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        foveate.attach(model, "fastv + snapkv").detach()


def test_it_can_be_silenced_by_its_category(model: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore", foveate.NeedsTraining)
        foveate.attach(model, "ppe(keep=0.5)").detach()

    assert not caught
