"""transformers' tests of a model, once plain and once with each identity recipe around every call of the model."""

from __future__ import annotations

import unittest
from typing import Any

from tests.peers.archive import model_tester_mixin
from tests.peers.asks import Generation
from tests.peers.identity import RECIPES, Attached
from tests.peers.models import FAMILIES, ModelTester
from tests.suite.bodies import BODIES

ModelTesterMixin = model_tester_mixin(Generation)


def _tests(family: str, recipe: str) -> type:
    def set_up(self: Any) -> None:
        self.model_tester = ModelTester(BODIES[FAMILIES[family]])
        self.all_model_classes = (type(self.model_tester.body.model()),)
        self.attached = Attached(RECIPES[recipe])
        self.enterContext(self.attached.around(self.all_model_classes))

    contents = {
        "__module__": __name__,
        "setUp": set_up,
        "family": family,
        "recipe": recipe,
        "_is_composite": True,
        "test_all_params_have_gradient": False,  # encoder layers behind the one that is read have none
    }
    return type(f"Test_{family}_{recipe}", (ModelTesterMixin, Generation, unittest.TestCase), contents)


for _family in FAMILIES:  # plain first: who fails there fails for reasons of its own
    for _recipe in RECIPES:
        _made = _tests(_family, _recipe)
        globals()[_made.__name__] = _made
del _made  # it would be collected twice
