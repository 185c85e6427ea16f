"""Blocks that run one by one give what the model gives, to the last bit, on every anatomy."""

from __future__ import annotations

from functools import partial

import pytest
import torch

import foveate
from foveate.core.errors import FoveateError
from foveate.core.roles import VISUAL, Role
from foveate.engine.replay import Replay
from foveate.engine.slopes import Slopes
from foveate.engine.trial import Trial
from foveate.models import anatomy
from tests.suite.bodies import BODIES, ONE, RAGGED


@pytest.mark.parametrize("name", BODIES)
def test_blocks_on_their_own_give_what_the_model_gives(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = 1
    replay = Replay(anatomy(model), [inputs | {"labels": labels}, body.inputs(ONE)])  # which compares them

    first = replay.batches[0]
    assert torch.equal(first.role != Role.PAD, inputs["attention_mask"].bool())
    visual = (first.role == Role.IMAGE).sum()
    assert visual == sum(images for _, images, _ in RAGGED) * sum(body.views)
    assert bool((first.role[:, -2:] == Role.ANSWER).all())
    assert [added is not None for added in first.added] == [
        name.startswith("qwen3_vl") and number < 3 for number in range(len(replay.blocks))
    ]
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in replay.blocks)
    assert Replay(anatomy(model), [inputs], "encoder").batches[0].x.shape[-1] == 32


def test_a_model_that_says_something_else_each_time_is_refused() -> None:
    model = BODIES["llava-clip"].model()
    layer = model.model.language_model.layers[1]
    times: list[int] = []

    def differently(module: torch.nn.Module, args: object, output: torch.Tensor) -> torch.Tensor:
        times.append(1)
        return output * (1 + len(times))

    layer.mlp.register_forward_hook(differently)
    with pytest.raises(FoveateError, match="on their own do not give what the model gives"):
        Replay(anatomy(model), [BODIES["llava-clip"].inputs(ONE)])


@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "qwen3_vl"])
def test_linears_of_one_input_are_found_with_what_makes_it(name: str) -> None:
    body = BODIES[name]
    trial, _ = _trial(name, body.model(**({"kv_heads": 4} if name == "llava-clip" else {})))

    inner = ("mlp.gate_proj", "mlp.up_proj")
    assert trial.groups == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        inner,
        ("mlp.down_proj",),
    )
    assert trial.feeder("mlp.down_proj") == "mlp.up_proj"
    assert trial.feeder("self_attn.o_proj") == ("self_attn.v_proj" if name == "llava-clip" else None)
    assert trial.source("self_attn.k_proj") == "input_layernorm"
    norm = "pre_feedforward_layernorm" if name == "gemma3" else "post_attention_layernorm"
    assert trial.source("mlp.up_proj") == norm


def test_rows_leave_padding_out_and_say_whose_they_are() -> None:
    trial, replay = _trial("llava-clip")
    (rows, _) = trial.exact("mlp.up_proj")
    watched = replay.batches[0]

    assert len(rows.x) == int((watched.role != Role.PAD).sum())
    assert rows.sample.unique_consecutive().tolist() == [0, 1, 2]
    assert torch.equal(rows.role, watched.role[watched.role != Role.PAD])
    parts = list(trial.inspect(("mlp.gate_proj", "mlp.up_proj")))
    assert torch.equal(parts[0].x[watched.role != Role.PAD], rows.x)


def test_a_part_runs_with_other_linears_and_lets_gradients_through() -> None:
    trial, _ = _trial("llava-clip")
    for names in (("self_attn.q_proj", "self_attn.k_proj"), ("mlp.down_proj",), ()):
        part = next(trial.inspect(names))
        plain = part.run(part.x)
        weight = trial.weight("mlp.down_proj" if "mlp" in str(names) or not names else "self_attn.q_proj")
        name = "mlp.down_proj" if "mlp" in str(names) or not names else "self_attn.q_proj"
        assert torch.equal(part.run(part.x, {name: lambda x, weight=weight: x @ weight.T}), plain) or torch.allclose(
            part.run(part.x, {name: lambda x, weight=weight: x @ weight.T}), plain, atol=1e-6
        )
        moved = weight.clone().requires_grad_()
        x = part.x.clone().requires_grad_()
        part.run(x, {name: lambda x, moved=moved: x @ moved.T}).square().sum().backward()
        assert moved.grad is not None
        assert x.grad is not None
        assert moved.grad.any()
        assert x.grad.any()
        assert torch.equal(part.run(part.x), plain)


def test_slopes_are_gradients_of_the_loss_and_of_each_sample_alone() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    batch = body.inputs(RAGGED)
    labels = torch.full_like(batch["input_ids"], -100)
    labels[:, -2:] = batch["input_ids"][:, -2:]
    batch |= {"labels": labels}
    replay = Replay(anatomy(model), [batch])
    (found,) = Slopes(replay, [batch]).of("mlp.down_proj")[2]

    kept: list[torch.Tensor] = []
    linear = model.model.language_model.layers[2].mlp.down_proj

    def keep(module: torch.nn.Module, args: object, output: torch.Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    handle = linear.register_forward_hook(keep)
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    handle.remove()
    loss = sum(
        torch.nn.functional.cross_entropy(row[-3:-1], answer[-2:]) for row, answer in zip(logits, labels, strict=True)
    )
    loss.backward()  # type: ignore[union-attr]
    grad = kept[0].grad
    assert grad is not None
    torch.testing.assert_close(found.x[:, 0], grad.abs().mean(-1)[batch["attention_mask"].bool()], rtol=1e-4, atol=1e-9)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl", "qwen3_vl"])
def test_a_pull_is_the_slope_of_what_answers_are_off(name: str) -> None:
    body, part = BODIES[name], "encoder"
    model = body.model().double()
    batch = {key: value.double() if value.is_floating_point() else value for key, value in body.inputs(RAGGED).items()}
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    batch["labels"][0, -2:] = batch["input_ids"][0, -2:]
    replay = Replay(anatomy(model), [batch], part)
    slopes, chance = Slopes(replay, [batch]), torch.Generator().manual_seed(0)
    own = replay.run(replay.copy(0), 0, 0, replay.batches[0].x, whole=False)
    assert slopes.pull(0, 0, own, 3.0).abs().max() < 1e-9  # what it says itself is off by nothing
    moved = own + torch.randn(own.shape, generator=chance, dtype=own.dtype) / 10
    way = torch.randn(own.shape, generator=chance, dtype=own.dtype)

    def off(made: torch.Tensor) -> torch.Tensor:
        """The divergence of answers, all of it by another way: the model's own logits."""
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        block, total = replay.blocks[0], torch.zeros(())
        plain = model(**inputs).logits / 3
        handle = block.register_forward_hook(lambda *_: (made,) if isinstance(_[2], tuple) else made)
        said = model(**inputs).logits / 3
        handle.remove()
        for sample, rows in enumerate([slice(-3, -1), slice(-1, None), slice(-1, None)]):
            wanted, found = plain[sample, rows].log_softmax(-1), said[sample, rows].log_softmax(-1)
            total = total + (wanted.exp() * (wanted - found)).sum(-1).mean()
        return total

    with torch.no_grad():
        wanted = (off(moved + 1e-4 * way) - off(moved - 1e-4 * way)) / 2e-4
    found = (slopes.pull(0, 0, moved, 3.0) * way).sum()
    torch.testing.assert_close(found.double(), wanted.double(), rtol=2e-2, atol=1e-7)
    assert not any("forward" in vars(block) for block in replay.blocks)
    assert all(parameter.requires_grad for parameter in model.parameters())


def _trial(name: str, model: object = None) -> tuple[Trial, Replay]:
    body = BODIES[name]
    batches = [body.inputs(RAGGED), body.inputs(ONE)]
    replay = Replay(anatomy(model or body.model()), batches)  # type: ignore[arg-type]
    states = {"exact": [watched.x for watched in replay.batches]}
    return Trial(replay, 0, states, Slopes(replay, batches), print), replay  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["llava-clip", "qwen3_vl", "qwen2_5_vl"])
def test_what_acts_before_the_language_model_runs_while_samples_are_read(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs(RAGGED)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -2:] = inputs["input_ids"][:, -2:]
    batch = inputs | {"labels": labels}
    parts = anatomy(model)
    replay = Replay(parts, [batch], attaching=partial(foveate.attach, model, "uniform(keep=3)"))  # which compares them

    watched, whole = replay.batches[0], Replay(parts, [batch]).batches[0]
    visual = torch.isin(watched.role, torch.tensor(VISUAL))
    assert visual.sum() == 3 * sum(images for _, images, _ in RAGGED) * len(body.views)
    for role in (Role.TEXT, Role.ANSWER):
        assert torch.equal((watched.role == role).sum(1), (whole.role == role).sum(1))
    # Words enter the first block as they do without.
    assert torch.equal(watched.x[watched.role == Role.ANSWER], whole.x[whole.role == Role.ANSWER])
    slopes = Slopes(replay, [batch]).of("mlp.down_proj")
    assert [len(rows[0].x) for rows in slopes] == [int((watched.role != Role.PAD).sum())] * len(replay.blocks)
    assert all(bool((rows[0].x[rows[0].role == Role.ANSWER] > 0).any()) for rows in slopes)
    assert "_foveate_session" not in vars(model)
