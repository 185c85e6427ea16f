"""What each method must prove, on every anatomy that can host it (DESIGN, "What each method must prove")."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import foveate
from foveate.core.errors import FoveateError
from foveate.core.method import Method, Tokens
from foveate.core.recipe import build
from foveate.core.roles import Role
from foveate.engine.session import Session
from foveate.engine.sides import Present, saying
from foveate.engine.stand_in import stand_in
from foveate.methods import ToMe
from foveate.models import Anatomy
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import fed_lengths, generate, logits
from tests.suite.oracle import Notes, masked_logits, noting, short_logits
from tests.suite.pairs import HOSTED, READ, REFUSED, UNREAD, lent, refusal

hosted = pytest.mark.parametrize(("method", "body"), [*HOSTED, *READ])
CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("method", "body"), [*REFUSED, *UNREAD])
def test_a_model_that_cannot_host_the_method_is_refused_by_name(method: Method, body: Body) -> None:
    reason = refusal(method, body)
    assert reason is not None
    assert reason.startswith(f"{method.name}: ")
    assert "\n" not in reason


@hosted
def test_identity_leaves_the_logits_alone(method: Method, body: Body) -> None:
    if method.identity_at is None:
        pytest.skip(f"{method.name} has no setting at which it is the identity")
    model, inputs = body.model(), body.inputs(RAGGED)
    plain = logits(generate(model, inputs, 4))
    with attach(model, replace(method, **method.identity_at), body):
        same = logits(generate(model, inputs, 4))
    torch.testing.assert_close(same, plain, rtol=1e-5, atol=1e-5)


@hosted
def test_detaching_restores_the_model_bit_for_bit(method: Method, body: Body) -> None:
    model, inputs = body.model(), body.inputs(ONE)
    plain = logits(generate(model, inputs, 4))
    before = fingerprint(model)
    with attach(model, method, body):
        generate(model, inputs, 2)
    assert fingerprint(model) == before
    assert torch.equal(logits(generate(model, inputs, 4)), plain)


@hosted
def test_an_exception_in_mid_generation_leaves_nothing_behind(method: Method, body: Body) -> None:
    model, inputs = body.model(), body.inputs(ONE)
    plain = logits(generate(model, inputs, 4))
    before = fingerprint(model)

    def stop(ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), attach(model, method, body):
        generate(model, inputs, 4, stopping_criteria=[stop])
    assert fingerprint(model) == before
    assert torch.equal(logits(generate(model, inputs, 4)), plain)


@hosted
@pytest.mark.parametrize("samples", [ONE, RAGGED], ids=["one", "ragged"])
def test_removal_equals_masking_in_prefill_and_decode(method: Method, body: Body, samples: list[Any]) -> None:
    model, inputs = body.model(), body.inputs(samples)
    prompt = inputs["input_ids"].shape[1]
    with noting() as notes, attach(model, method, body) as session:
        output = generate(model, inputs)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    expected = oracle(model, whole, session, notes)
    torch.testing.assert_close(logits(output), expected[:, prompt - 1 :], **CLOSE)


@hosted
def test_a_second_turn_is_fed_its_new_tokens_and_answered_as_the_first_was(method: Method, body: Body) -> None:
    model, inputs = body.model(), body.inputs(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    question = torch.randint(11, tiny.VOCABULARY, (3, 5), generator=torch.Generator().manual_seed(7))
    with noting() as notes, attach(model, method, body) as session:
        first = generate(model, inputs, 4)
        whole = body.extended(inputs, torch.cat([first.sequences[:, prompt:], question], dim=1))
        with fed_lengths(model) as fed:
            second = generate(model, body.without_pictures(whole), 6, past_key_values=first.past_key_values)
    assert fed == [1 + 5, *[1] * 5]  # the last answer token was never fed
    start = whole["input_ids"].shape[1]
    longer = body.extended(whole, second.sequences[:, start:-1])
    expected = oracle(model, longer, session, notes)
    torch.testing.assert_close(logits(second), expected[:, start - 1 :], **CLOSE)


@hosted
def test_a_sample_gets_in_a_padded_batch_what_it_gets_alone(method: Method, body: Body) -> None:
    model = body.model().double()
    together = body.inputs(RAGGED)
    with attach(model, method, body) as session:
        batch = logits(generate(model, double(together), 6))
        alive = session.trace.alive(session.anatomy.traits().decoder_layers) or [[]] * len(RAGGED)
        for place, sample in enumerate(RAGGED):
            alone = body.inputs(RAGGED, only=place)
            torch.testing.assert_close(logits(generate(model, double(alone), 6))[0], batch[place], rtol=1e-6, atol=1e-6)
            mine = (session.trace.alive(session.anatomy.traits().decoder_layers) or [[]])[0]
            assert [kept.tolist() for kept in mine] == [kept.tolist() for kept in alive[place]], sample


@hosted
def test_exactly_the_promised_number_of_tokens_lives(method: Method, body: Body) -> None:
    if not isinstance(method, Tokens) or not hasattr(method, "keep"):
        pytest.skip(f"{method.name} promises no number of tokens")
    model, inputs = body.model(), body.inputs(ONE)
    scopes = (body.views, (body.tokens,), (body.tokens // body.frames,) * body.frames)
    for keep in (1, 5, body.tokens, 10_000, 0.5):
        sized = replace(method, keep=keep)
        if (reason := refusal(sized, body)) is not None:  # some cannot go as low, and say so
            assert f"keep={keep!r}" in reason
            continue
        with attach(model, sized, body) as session:
            model(**inputs)
        last = session.anatomy.traits().decoder_layers
        # A budget is of each grid, of the prompt, or of each frame, as the method says.
        promises = {sum(min(keep, n) if isinstance(keep, int) else round(n * keep) for n in of) for of in scopes}
        alive = sum(len(item) for item in session.trace.alive(last)[0])
        assert alive in promises
        assert session.report.visual_tokens[-1] == alive


@hosted
def test_no_attention_map_is_ever_formed(method: Method, body: Body) -> None:
    if body.name != "llava-clip":
        pytest.skip("counted on the anatomy with the largest grid")
    model = tiny.llava(grid=12)
    if isinstance(method, ToMe):
        method = replace(method, keep=0.4)  # six of 144 are out of its reach
    ids = torch.tensor([[1, 20, *[tiny.IMAGE] * 144, 30, 31, 32]])
    with attach(model, method, body), Allocations() as seen:
        model(input_ids=ids, pixel_values=torch.randn(1, 3, 96, 96))
    rows = ids.shape[1]
    maps = [shape for shape in seen.shapes if len(shape) == 4 and shape[1] > 1 and min(shape[-2:]) >= 144]
    assert maps == []
    assert max(shape.numel() for shape in seen.shapes) <= 4 * rows * 145


@pytest.mark.parametrize("name", [name for name in BODIES if name != "qwen3_5"])
def test_every_attention_kernel_gives_the_same_answer(name: str) -> None:
    body = BODIES[name]
    inputs = body.inputs(RAGGED)
    outputs = []
    for kernel in ("sdpa", "eager"):
        model = body.model(attention=kernel)
        with foveate.attach(model, "fastv(keep=6) + snapkv(keep=0.6, window=4)"):
            outputs.append(logits(generate(model, inputs, 6)))
    torch.testing.assert_close(outputs[0], outputs[1], **CLOSE)


def test_a_budget_of_nothing_is_refused_by_name() -> None:
    for name in ("random", "uniform", "fastv", "hiprune", "scope", "snapkv"):
        with pytest.raises(FoveateError, match=rf"{name}: keep=0: must be a positive count"):
            build(name, {"keep": 0})


@pytest.mark.parametrize(
    "recipe",
    [
        "hiprune(keep=9, positions='anchor') + shortv(layers=(1,)) + fastv(layer=2, keep=5) + snapkv(keep=0.7, window=4)",
        # Both halves of a layer are read in which rows are frozen.
        "shortv(layers=(1,)) + transprune(layers=(2,), ratios=(0.5,), accumulate=(2,))",
    ],
)
def test_composition_runs_and_equals_its_oracle(recipe: str) -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(RAGGED)
    prompt = inputs["input_ids"].shape[1]
    with noting() as notes, foveate.attach(model, recipe):
        output = generate(model, inputs)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    expected = masked_logits(model, whole, notes.trace, (0,), notes)
    torch.testing.assert_close(logits(output), expected[:, prompt - 1 :], **CLOSE)


def oracle(model: Any, whole: dict[str, torch.Tensor], session: Session, notes: Notes) -> torch.Tensor:
    """Where layers have a recurrent state, removing is not masking; where rows are put in, there is nothing to mask."""
    logs = notes.trace.log  # of prompts with pictures
    inserted = any((of.role == Role.INSERTED).any() for log in logs[:1] for of in log)
    with still_replaced(session), said_of(whole["input_ids"], session.anatomy):
        if session.anatomy.traits().recurrent or inserted:
            return short_logits(model, whole, notes.trace, notes)
        return masked_logits(model, whole, notes.trace, (0,)[: len(logs)], notes)


@contextmanager
def still_replaced(session: Session) -> Iterator[None]:
    """Linears that a session had replaced are, without it: an oracle masks rows, it leaves weights as they are."""
    undo = [stand_in(packed.linear, "forward", packed) for packed in session._program.packed]
    try:
        yield
    finally:
        for each in undo:
            each()


def said_of(ids: torch.Tensor, parts: Anatomy) -> AbstractContextManager[None]:
    """The rows of the whole prompt ``ids`` run meanwhile, as no session knows."""
    role = torch.full_like(ids, int(Role.TEXT))
    for kind, tokens in (
        (Role.IMAGE, parts.image_tokens),
        (Role.VIDEO, parts.video_tokens),
        (Role.AUDIO, parts.audio_tokens),
    ):
        role[torch.isin(ids, torch.tensor([*tokens], dtype=ids.dtype))] = int(kind)
    return saying(Present(role))


def attach(model: Any, method: Method, body: Body) -> Session:
    """With what the method needs on this body."""
    return foveate.attach(model, method, artifacts=lent(body, model))


def fingerprint(model: Any) -> tuple[Any, ...]:
    """Everything that a session might leave behind."""
    hooks = {
        name: (len(module._forward_hooks), len(module._forward_pre_hooks), sorted(map(str, vars(module))))
        for name, module in model.named_modules()
    }
    tensors = {name: hash(tensor.numpy().tobytes()) for name, tensor in model.state_dict().items()}
    attention = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    return hooks, tensors, str(model.config), str(model.generation_config), attention


def double(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


class Allocations(TorchDispatchMode):
    """Collects the shapes of all float tensors that operators return."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: set[torch.Size] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                self.shapes.add(tensor.shape)
        return out
