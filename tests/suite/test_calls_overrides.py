"""What others put in the model's way is called while a session is attached, and is there afterwards; and copies."""

from __future__ import annotations

import copy
import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.errors import FoveateError
from tests.suite.bodies import ONE
from tests.suite.conversation import generate
from tests.suite.protocols import BLOCKS, LLAVA, ROWS, attached

RECIPES = ["none", "tome(keep=9) + fastv(layer=2, keep=4)", f"shortv(layers=(1,)) + {BLOCKS}", f"hiprune(keep=6) + {ROWS}"]
recipes = pytest.mark.parametrize("recipe", RECIPES)
when = pytest.mark.parametrize("early", [True, False], ids=["before attach", "while attached"])


@pytest.fixture
def functions() -> Iterator[dict[str, Any]]:
    """The attention functions of transformers that somebody set, as they were before and are afterwards."""
    mine = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = dict(mine)
    yield mine
    mine.clear()
    mine.update(before)


class Counted:
    """A function that counts its calls, and doubles what it returns if it is told to."""

    def __init__(self, function: Callable[..., Any]) -> None:
        functools.update_wrapper(self, function)
        self.function, self.calls = function, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.function(*args, **kwargs)


@torch.no_grad()
def answer(model: Any) -> Tensor:
    """Ids of a short answer."""
    return generate(model, LLAVA.inputs(ONE), 3).sequences  # type: ignore[no-any-return]


def expected(recipe: str) -> Tensor:
    """The same of a model that nobody touched."""
    model = LLAVA.model()
    with attached(model, recipe):
        return answer(model)


@recipes
@when
def test_an_attention_function_of_the_users_is_called_and_stays(recipe: str, early: bool, functions: dict[str, Any]) -> None:
    model, right, mine = LLAVA.model(), expected(recipe), Counted(ALL_ATTENTION_FUNCTIONS["sdpa"])
    if early:
        functions["sdpa"] = mine
    with attached(model, recipe):
        functions["sdpa"], mine.calls = mine, 0
        assert torch.equal(answer(model), right)
        under = mine.calls
        assert functions["sdpa"] is mine
    assert functions["sdpa"] is mine
    answer(model)
    blocks, layers = 4, 4
    assert mine.calls - under == blocks + 3 * layers
    # Entries that are stored by head are read by us.
    assert under == blocks + (1 if BLOCKS in recipe else 3) * layers


@recipes
@when
@pytest.mark.parametrize(
    "place",
    [
        *("generate", "forward", "model.forward", "model.language_model.forward", "model.get_image_features"),
        *("model.language_model.layers.2.forward", "model.vision_tower.forward", "model.multi_modal_projector.forward"),
    ],
)
def test_a_function_of_an_instance_is_called_and_stays(recipe: str, early: bool, place: str) -> None:
    model = LLAVA.model()
    path, _, name = place.rpartition(".")
    module = model.get_submodule(path)

    def put() -> Counted:
        setattr(module, name, Counted(getattr(module, name)))
        return module.__dict__[name]  # type: ignore[no-any-return]

    mine = put() if early else None
    session = attached(model, recipe)
    mine = mine or put()
    assert torch.equal(answer(model), expected(recipe))
    under = mine.calls
    session.detach()
    assert module.__dict__[name] is mine
    plain = answer(model)
    assert 0 < under <= mine.calls - under
    assert torch.equal(plain, answer(LLAVA.model()))


class Noted(ModelHook):
    """A hook of accelerate's that counts."""

    def __init__(self) -> None:
        self.calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


@recipes
@when
def test_wrappers_of_accelerate_are_called_and_can_be_taken_away(recipe: str, early: bool) -> None:
    model, hook = LLAVA.model(), Noted()
    places = [model, model.model, model.model.language_model, *model.model.language_model.layers]
    places += [model.model.vision_tower, *model.model.vision_tower.encoder.layers]

    def wrap() -> None:
        for module in places:
            add_hook_to_module(module, hook)

    if early:
        wrap()
    session = attached(model, recipe)
    if not early:
        wrap()
    hook.calls = 0
    assert torch.equal(answer(model), expected(recipe))
    under = hook.calls
    assert under == 3 * (3 + 4) + 5
    session.detach()
    assert torch.equal(answer(model), answer(LLAVA.model()))
    assert hook.calls == 2 * under
    for module in places:
        remove_hook_from_module(module)
    assert torch.equal(answer(model), answer(LLAVA.model()))
    assert hook.calls == 2 * under


@recipes
@when
def test_peft_works_and_can_be_unloaded(recipe: str, early: bool) -> None:
    model, right = LLAVA.model(), expected(recipe)
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapted(model: Any) -> Any:
        torch.manual_seed(0)
        return get_peft_model(model, config)

    other = LLAVA.model()
    with attached(adapted(other).get_base_model(), recipe):
        tuned = answer(other)
    peft = adapted(model) if early else None
    session = attached(model, recipe)
    peft = peft or adapted(model)
    assert torch.equal(answer(peft), tuned)
    assert not torch.equal(tuned, right)
    with peft.disable_adapter():
        assert torch.equal(answer(peft), right)
    session.detach()
    assert torch.equal(answer(peft.unload()), answer(LLAVA.model()))


# Copies.


@recipes
def test_a_copy_of_an_attached_model_is_a_plain_model_with_its_own_weights(recipe: str) -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    plain = answer(model)
    with attached(model, recipe):
        right = answer(model)
        twin = copy.deepcopy(model)
        assert torch.equal(answer(twin), plain)
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        assert torch.equal(answer(twin), plain)
        with attached(twin, recipe) as session:
            assert torch.equal(answer(twin), right)
            assert session.anatomy.model is twin
    with torch.no_grad():
        assert float(model(**inputs).logits.abs().max()) == 0
    assert torch.equal(answer(twin), plain)


@recipes
@pytest.mark.parametrize("place", ["model", "model.language_model", "model.language_model.layers.2", "model.vision_tower"])
def test_a_copy_of_a_part_is_a_plain_part(recipe: str, place: str) -> None:
    model = LLAVA.model()
    with attached(model, recipe):
        twin = copy.deepcopy(model.get_submodule(place))
    plain = LLAVA.model()
    plain.set_submodule(place, twin)
    assert torch.equal(answer(plain), answer(LLAVA.model()))
    assert not {id(weight) for weight in twin.parameters()} & {id(weight) for weight in model.parameters()}


def test_saving_an_attached_model_whole_is_refused_with_the_remedy() -> None:
    model = LLAVA.model()
    with attached(model, RECIPES[1]), pytest.raises(FoveateError, match=r"^model: runs under [^\n]*; detach before saving$"):
        pickle.dumps(model)
    assert pickle.dumps(model)
