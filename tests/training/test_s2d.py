"""S2D: the penalty and its choice of layers by hand, in loops and in Trainer, and a sick encoder that heals."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from tests.suite.bodies import BODIES, SEVERAL
from torch import Tensor, nn
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.ops.grid import Grid
from foveate.training import S2D, diagnose, encoder_linears
from foveate.training.spectra import Spectrum, chosen, shares

SICK = "encoder.layers.1.self_attn.v_proj"
BESIDE = "encoder.layers.1.self_attn.out_proj"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(*weight.T.shape, bias=False)
    linear.weight.data = weight.clone()
    return linear


def decaying(weight: Tensor, **options: Any) -> tuple[S2D, nn.Linear]:
    """Whose layers are all chosen, with ``most`` components."""
    linear = layer(weight)
    decay = S2D({"layer": linear}, **{"threshold": 1e-9, "strength": 1.0, **options})
    linear(random(7, weight.shape[1]))
    return decay, linear


def test_the_cards_penalty() -> None:
    weight = torch.diag(torch.tensor([3.0, 1.0]))
    full = Spectrum.of(weight)
    assert_close(full.slope(2.0), torch.diag(torch.tensor([9.0, 1.0])))
    assert_close((full.values**3).sum() / 3, torch.tensor(9.333333))
    decay, linear = decaying(weight)  # one component is share enough
    penalty = decay.loss()
    assert_close(penalty, torch.tensor(9.0))
    penalty.backward()  # type: ignore[no-untyped-call]
    assert_close(linear.weight.grad, torch.diag(torch.tensor([9.0, 0.0])))


def test_the_cards_shares() -> None:
    weight = torch.tensor([[3.0, -1.0], [3.0, 1.0]]) / math.sqrt(2)
    found = shares(weight, torch.ones(1, 2), 2)
    assert_close(found, torch.tensor([0.75, 1.0]))
    assert chosen(found, 0.95) == 2
    assert chosen(found, 0.7) == 1
    assert chosen(found[:1], 0.95) == 0
    sizes = shares(weight, torch.ones(1, 2), 2, absolute=True)
    assert_close(sizes, torch.tensor([0.75, 1.0]))
    # At the other neuron the second component takes something away.
    assert_close(shares(weight, torch.tensor([[1.0, -1.0]]), 2), torch.tensor([0.75, 1.0]))


def test_shares_are_those_of_all_components_one_by_one() -> None:
    weight, x = random(6, 5), random(9, 5, seed=1)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    for absolute in (False, True):
        wanted = torch.zeros(3)
        for row in x:
            neuron = int((weight @ row).abs().argmax())
            parts = values * left[neuron] * (right @ row)
            parts = parts.abs() if absolute else parts
            wanted += parts.cumsum(0)[:3].abs() / parts.sum().abs() / len(x)
        assert_close(shares(weight, x, 3, absolute), wanted)
    assert_close(shares(torch.outer(random(4), random(5)), x, 1), torch.ones(1))
    assert not shares(torch.zeros(4, 5), x, 2).any()


@pytest.mark.parametrize("power", [1.0, 2.0, 3.5])
def test_the_gradient_is_that_of_the_penalty(power: float) -> None:
    weight = random(6, 4)
    decay, linear = decaying(weight, power=power, strength=0.3, most=4, threshold=0.9999)
    decay.add_gradients()
    count = len(decay.chosen["layer"].values)
    free = weight.clone().requires_grad_()
    penalty = 0.3 / (power + 1) * torch.linalg.svdvals(free)[:count].pow(power + 1).sum()
    penalty.backward()
    assert_close(linear.weight.grad, free.grad, atol=1e-5, rtol=1e-4)
    again = decay.loss()
    assert_close(again, penalty)
    linear.weight.grad = None
    again.backward()
    assert_close(linear.weight.grad, free.grad, atol=1e-5, rtol=1e-4)
    if count == 4 and power == 1:
        assert_close(linear.weight.grad, 0.3 * weight, atol=1e-5, rtol=1e-4)  # ordinary weight decay


def test_a_step_lowers_what_was_chosen_and_nothing_else() -> None:
    weight = torch.linalg.qr(random(5, 5))[0] @ torch.diag(torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0]))
    for tracked in (False, True):
        decay, linear = decaying(weight, strength=0.1, tracked=tracked)
        count = len(decay.chosen) or 1
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        for turn in range(2):
            before = torch.linalg.svdvals(linear.weight.detach())
            decay.shrink(optimizer)
            after = torch.linalg.svdvals(linear.weight.detach())
            used = torch.tensor(5.0) if not tracked else before[0]
            assert_close(after[0], before[0] - 0.1 * 0.1 * used**2), turn
            assert_close(after[1:], before[1:])
        assert count == 1


def test_layers_are_looked_at_again_after_so_many_steps_and_are_left_alone_where_no_component_stands_out() -> None:
    torch.manual_seed(0)
    sick, healthy = layer(torch.outer(random(8), random(8, seed=1)) * 9 + random(8, 8) / 99), layer(random(8, 8))
    decay = S2D({"sick": sick, "healthy": healthy}, every=3, most=1, threshold=0.99)
    x = random(40, 8, seed=2)
    seen = []
    for number in range(5):
        sick(x), healthy(x)
        decay.loss()
        seen.append(decay.chosen["sick"].values.clone())
        assert list(decay.chosen) == ["sick"]
        with torch.no_grad():
            sick.weight /= 2
        decay.step()
        assert decay.steps == number + 1
    assert torch.equal(seen[0], seen[2])
    assert_close(seen[3], seen[0] / 8)
    with torch.no_grad():  # of what runs without gradients (an evaluation) nothing is heard
        decay.step()
        sick(x)
        decay.loss()
    assert not decay.chosen
    decay.detach()
    assert not sick._forward_pre_hooks


def test_processes_choose_what_the_first_of_them_does(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(counts: Tensor, source: int) -> None:
        assert (counts.tolist(), source) == ([1, 0], 0)
        counts.copy_(torch.tensor([0, 2]))

    linears = {"sick": layer(torch.outer(random(8), random(8, seed=1))), "healthy": layer(random(8, 8))}
    decay = S2D(linears)
    for linear in linears.values():
        linear(random(40, 8, seed=2))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "broadcast", told)
    decay.loss()
    assert {name: len(one.values) for name, one in decay.chosen.items()} == {"healthy": 2}


def test_queries_keys_and_values_in_one_weight_are_three() -> None:
    weight = torch.cat([random(4, 4), 50 * torch.outer(random(4), random(4, seed=1)), random(4, 4, seed=2)])
    linear = layer(weight)
    decay = S2D({"attn.qkv": linear}, most=1)
    linear(random(30, 4, seed=3))
    decay.add_gradients()
    assert list(decay.chosen) == ["attn.qkv.k"]
    grad = linear.weight.grad
    assert grad is not None
    assert not grad[:4].any()
    assert not grad[8:].any()
    assert grad[4:8].any()


def test_linears_are_those_of_the_encoders_blocks() -> None:
    for name in ("llava-clip", "qwen2_5_vl", "gemma3"):
        found = encoder_linears(BODIES[name].model())
        assert all("vis" in each for each in found)
        assert not any("embed" in each or "head" in each for each in found)
    alone = encoder_linears(tiny.llava().model.vision_tower)
    assert len(alone) == 4 * 6
    assert SICK in alone


def test_what_cannot_be_is_said_in_a_line() -> None:
    tower = tiny.llava().model.vision_tower
    for options, message in (
        ({"strength": -1.0}, "strength=-1.0: must be 0 or more"),
        ({"power": 0.5}, "power=0.5: must be 1 or more"),
        ({"threshold": 0.0}, "threshold=0.0: must be more than 0"),
        ({"most": 0}, "most=0: must be 1 or more"),
        ({"every": 0}, "every=0: must be 1 or more"),
    ):
        with pytest.raises(FoveateError, match=message):
            S2D(tower, **options)  # type: ignore[arg-type]
    with pytest.raises(FoveateError, match="layers: none of them is trained; unfreeze the encoder"):
        S2D(tower.requires_grad_(False))
    with pytest.raises(FoveateError, match="'a' is no linear with plain floats"):
        S2D({"a": nn.Conv2d(1, 1, 1)})  # type: ignore[dict-item]
    with pytest.raises(FoveateError, match="nothing in its encoder can be read"):
        encoder_linears(SEVERAL.model())
    with pytest.raises(FoveateError, match="has no blocks with linears"):
        encoder_linears(nn.Sequential(nn.Conv2d(1, 1, 1)))
    decay, _ = decaying(random(3, 3))
    decay.loss()
    with pytest.raises(FoveateError, match="has a layer 'layer' that is not among these"):
        S2D({"other": layer(random(3, 3))}).load_state_dict(decay.state_dict())


class Task(nn.Module):
    """Pictures of four kinds, and an encoder that learns to tell them apart."""

    def __init__(self, sick: bool = True) -> None:
        super().__init__()
        self.tower = tiny.llava().model.vision_tower
        torch.manual_seed(0)
        self.head = nn.Linear(32, 4)
        if sick:
            linears = encoder_linears(self.tower)
            with torch.no_grad():
                linears[SICK].weight[5] *= 100
                linears[SICK].bias[5] *= 100
                linears[BESIDE].weight[:, 5] /= 100

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.head(self.tower(pixel_values).last_hidden_state.mean(1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def pictures(seed: int = 0) -> tuple[Tensor, Tensor]:
    kinds, labels = random(4, 3, 32, 32), torch.arange(24) % 4
    return kinds[labels] + random(24, 3, 32, 32, seed=seed + 1), labels


def trained(
    strength: float | None, steps: int = 60, sick: bool = True, **options: Any
) -> tuple[Task, list[float], set[str]]:
    """The task, its losses, and which layers were ever chosen."""
    task, (pixels, labels) = Task(sick), pictures()
    optimizer = torch.optim.AdamW(task.parameters(), lr=1e-3)
    decay = None if strength is None else S2D(task.tower, strength=strength, every=10, tracked=True)
    losses, found = [], set()
    for number in range(steps):
        rows = torch.arange(12) + 12 * (number % 2)
        loss = task(pixels[rows], labels[rows])["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if decay is not None:
            decay.shrink(optimizer)
            decay.step()
            found |= set(decay.chosen)
        losses.append(float(loss.detach()))
    return task, losses, found


@torch.no_grad()
def rounded_off(task: Task) -> float:
    """By how much features are off once the two layers have weights and inputs of 4 bits, inputs by one range for all."""
    pixels, _ = pictures(seed=7)
    other = copy.deepcopy(task.tower)

    def rounding(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        step = args[0].abs().amax() / 7
        return ((args[0] / step).round() * step,)

    for name in (SICK, BESIDE):
        linear = encoder_linears(other)[name]
        linear.weight.copy_(Grid.of(linear.weight, 4).rounded(linear.weight))
        linear.register_forward_pre_hook(rounding)
    plain = task.tower(pixels).last_hidden_state
    return float((other(pixels).last_hidden_state - plain).norm() / plain.norm())


def test_a_sick_layer_heals_and_the_task_is_learnt_as_well() -> None:
    pixels, _ = pictures()
    sick, well = Task(), Task(sick=False)
    # The same function, made otherwise.
    assert_close(sick.tower(pixels).last_hidden_state, well.tower(pixels).last_hidden_state, atol=1e-4, rtol=1e-3)
    plain, losses, _ = trained(None)
    decayed, others, found = trained(20.0)
    before, after = (diagnose(task.tower, lambda: task.tower(pixels))[SICK] for task in (plain, decayed))  # noqa: B023

    assert found == {SICK}
    assert after.largest < 0.2 * before.largest
    assert after.activation < 0.2 * before.activation
    assert before.shares[0] > 0.95 > after.shares[0]
    assert sum(others[-10:]) < 1.1 * sum(losses[-10:]) + 0.1
    assert losses[-1] < 0.5 * losses[0]
    assert rounded_off(decayed) < 0.7 * rounded_off(plain)


def test_a_healthy_encoder_is_trained_to_the_same_bits() -> None:
    plain, losses, _ = trained(None, steps=12, sick=False)
    decayed, others, found = trained(1.0, steps=12, sick=False)
    _, nothing, chosen_too = trained(0.0, steps=12)
    assert not found
    assert losses == others
    assert all(torch.equal(one, other) for one, other in zip(plain.parameters(), decayed.parameters(), strict=True))
    assert chosen_too == {SICK}
    assert nothing == trained(None, steps=12)[1]
    assert max(each.shares[2] for each in diagnose(plain.tower, lambda: plain.tower(pictures()[0])).values()) < 0.95


@pytest.mark.parametrize("accumulation", [1, 2])
def test_trainer_does_what_a_loop_does_and_goes_on_where_it_was(accumulation: int, tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments

    from foveate.training.trainer import FILE, S2DCallback

    pixels, labels = pictures()
    rows = [{"pixel_values": pixels[n], "labels": labels[n]} for n in range(24)]

    def train(steps: int, resume: bool = False, **more: Any) -> Task:
        task = Task()
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=8 // accumulation,
            gradient_accumulation_steps=accumulation,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            optim="sgd",
            save_steps=3,
            logging_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            max_grad_norm=0.0,
            **more,
        )
        trainer = Trainer(
            model=task,
            args=arguments,
            train_dataset=rows,  # type: ignore[arg-type]
            callbacks=[S2DCallback(S2D(task.tower, every=4, strength=1e-3), decoupled=accumulation == 2)],
        )
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3") if resume else None)
        return task

    whole = train(6)
    assert (tmp_path / "checkpoint-3" / FILE).exists()
    resumed = train(6, resume=True)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    assert (
        Spectrum.of(encoder_linears(whole.tower)[SICK].weight).values[0]
        < Spectrum.of(encoder_linears(Task().tower)[SICK].weight).values[0] - 0.01
    )
    with pytest.raises(FoveateError, match="fp16=True: gradients are scaled"):
        S2DCallback(S2D(whole.tower)).on_train_begin(_Half(), None, None)  # type: ignore[arg-type]


class _Half:
    fp16 = True
