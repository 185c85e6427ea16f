"""What the plug-in takes of vLLM is where it was, and without a recipe its classes are what they are derived from."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
import vllm

from foveate import FoveateError
from foveate.serving.vllm import ARCHITECTURES, contract, other
from foveate.serving.vllm.model import PruningModel
from foveate.serving.vllm.mrope import PlacingModel


def test_nothing_has_moved():
    assert contract.moved(vllm.__version__) == []


def test_this_is_the_version_that_recipes_are_tested_with():
    assert contract.tested(vllm.__version__), f"vLLM {vllm.__version__}: tested is {contract.TESTED}"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ours_stand_in_vllms_places(architecture):
    vllm.plugins.load_general_plugins()
    registered = vllm.ModelRegistry.models[architecture]
    assert registered.module_name == f"foveate.serving.vllm.{ARCHITECTURES[architecture]}"
    ours = getattr(import_module(registered.module_name), architecture)
    assert issubclass(
        ours, getattr(import_module(f"vllm.model_executor.models.{ARCHITECTURES[architecture]}"), architecture)
    )


class Plain:
    """A parent that notes what it is called with."""

    def __init__(self, *, vllm_config, prefix=""):
        self.called = []

    def __getattr__(self, name):
        raise AttributeError(name)

    def embed_multimodal(self, **kwargs):
        self.called.append(kwargs)
        return "embedded"

    def embed_input_ids(self, input_ids, multimodal_embeddings=None, *, is_multimodal=None):
        self.called.append((input_ids, multimodal_embeddings, is_multimodal))
        return input_ids

    def forward(self, *args, **kwargs):
        self.called.append((args, kwargs))
        return "hidden"

    def get_mrope_input_positions(self, tokens, features):
        return tokens, features


@pytest.mark.parametrize("mixin", [PruningModel, PlacingModel])
def test_without_a_recipe_everything_goes_to_the_parent_as_it_came(mixin):
    config = SimpleNamespace(model_config=SimpleNamespace(hf_config=SimpleNamespace()))
    model = type("Model", (mixin, Plain), {"family": "llava"})(vllm_config=config)
    pixels, ids, embedded = torch.zeros(1, 3), torch.zeros(4, dtype=torch.long), [torch.zeros(2, 8)]
    assert model.embed_multimodal(pixel_values=pixels) == "embedded"
    assert model.called[-1]["pixel_values"] is pixels
    model.embed_input_ids(ids, embedded, is_multimodal=ids.bool())
    assert model.called[-1][1] is embedded
    assert model.forward(ids, ids, None, pixels) == "hidden"
    assert model.called[-1][0][1] is ids
    assert model.get_mrope_input_positions([1], []) == ([1], [])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_version_refuses_a_recipe(architecture):
    given = SimpleNamespace(foveate={"recipe": "hiprune"})
    with pytest.raises(FoveateError, match=rf"recipes are tested with {contract.TESTED}"):
        getattr(other, architecture)(vllm_config=SimpleNamespace(model_config=SimpleNamespace(hf_config=given)))
