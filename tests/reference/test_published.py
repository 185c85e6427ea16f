"""The shipped checkpoints are what published ones are: unmodified readers of those, vLLM among them, load them."""

import json
from hashlib import sha256

import pytest
import torch
from safetensors.torch import load_file

from foveate import reference
from foveate.reference.published import published, respell

TRAINED = {
    "reference": "ac7041c1e3eba6b2",
    "reference-tiles": "e51cc7b1f65bd3b6",
    "reference-qwen": "3318f54614d327d2",
}
"""Of all bits of the weights as they were trained, whatever their names: answers are theirs."""


def digest(weights):
    seen = sha256()
    short = {name.replace("vision_model.", ""): weight for name, weight in weights.items()}
    for name in sorted(short):
        seen.update(name.encode())
        seen.update(short[name].contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return seen.hexdigest()[:16]


@pytest.mark.parametrize("name", reference.MODELS)
def test_weights_have_their_published_names_and_are_those_that_were_trained(name):
    weights = load_file(reference.path(name) / "model.safetensors")
    assert set(weights) == set(map(published, weights))
    assert digest(weights) == TRAINED[name]


@pytest.mark.parametrize("name", reference.MODELS)
def test_every_weight_arrives_in_the_model(name):
    weights = load_file(reference.path(name) / "model.safetensors")
    model, _ = reference.load(name)
    # A checkpoint's names end as the model's do; the reference's head is tied to its embedding.
    loaded = {key.split(".", 1)[1]: value for key, value in model.state_dict().items()}
    ends = {key.replace("vision_model.", "").removeprefix("language_model.").removeprefix("model."): key for key in weights}
    found = [
        (ends[end], value)
        for key, value in loaded.items()
        if (end := key.replace("vision_model.", "").removeprefix("language_model.")) in ends
    ]
    assert len({key for key, _ in found}) == len(weights)
    assert all(torch.equal(value, weights[key].to(value.dtype)) for key, value in found)


@pytest.mark.parametrize("name", reference.MODELS)
def test_the_processor_is_the_familys_own(name):
    folder = reference.path(name)
    kinds = {
        json.loads((folder / file).read_text())["processor_class"]
        for file in ("processor_config.json", "tokenizer_config.json")
    }
    assert kinds <= {"LlavaProcessor", "LlavaNextProcessor", "Qwen2_5_VLProcessor"}
    assert len(kinds) == 1


def test_what_transformers_saves_gets_the_published_names(tmp_path):
    model, _ = reference.load()
    model.save_pretrained(tmp_path)
    respell(tmp_path)
    assert set(load_file(tmp_path / "model.safetensors")) == set(load_file(reference.path() / "model.safetensors"))
