"""Training of the reference model, seeded and resumable, on CPU or GPU: ``python -m foveate_reference train``."""

from __future__ import annotations

import json
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import nn

from foveate.reference.model import Dimensions, build_model, build_text_tower, save_checkpoint

from .batches import KIND_NAMES, Batch, Window, draw_batch
from .muon import Muon
from .windows import PatchReadouts, answer_logits, encode


@dataclass(frozen=True)
class Stage:
    """``steps`` training steps that draw their window by the shares in ``mix``."""

    steps: int
    mix: tuple[tuple[Window, float], ...]


EYES = Window(cells=6, images=192, text=0, most=3)
SMALL = Window(cells=6, images=64, text=96, most=3)
MIDDLE = Window(cells=8, images=48, text=112, most=4)
FULL = Window(cells=12, images=32, text=128, most=6)
LOOSE_SMALL, LOOSE_MIDDLE = replace(SMALL, loose=True), replace(MIDDLE, loose=True)

CURRICULUM = (
    Stage(steps=300, mix=((EYES, 1.0),)),
    Stage(steps=280, mix=((SMALL, 0.9), (FULL, 0.1))),
    Stage(steps=300, mix=((SMALL, 0.35), (MIDDLE, 0.35), (FULL, 0.3))),
    Stage(steps=10_000, mix=((SMALL, 0.05), (MIDDLE, 0.15), (FULL, 0.8))),
)
"""First the encoder alone, at several times the speed, until patches read as words. Then small windows, where the decoder
finds the picture in minutes; what it learns there holds in the full grid."""


LOOSENING = Stage(steps=300, mix=((LOOSE_SMALL, 0.45), (LOOSE_MIDDLE, 0.15), (FULL, 0.4)))
"""After the curriculum, with a cool-down of its own: location is to travel in the features too, not in positions alone."""


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on.

    ``steps`` of the curriculum, the last ``decay`` of them cooling down; then the ``loosening`` from ``loosening_rate`` on.
    """

    steps: int = 1930
    seed: int = 0
    rate: float = 4e-3
    warmup: int = 80
    decay: float = 0.35
    reading_out: float = 0.2
    matching: float = 0.1
    curriculum: tuple[Stage, ...] = CURRICULUM
    loosening: Stage = LOOSENING
    loosening_rate: float = 1e-3
    dimensions: Dimensions = field(default_factory=Dimensions)
    device: str = "cpu"
    compiled: bool = True

    @property
    def all_steps(self) -> int:
        """Curriculum and loosening."""
        return self.steps + self.loosening.steps

    def window(self, step: int) -> Window:
        """The window of a step: a function of seed and step."""
        first = 0
        for stage in self.curriculum if step < self.steps else (self.loosening,):
            if step < first + stage.steps or step >= self.steps:
                break
            first += stage.steps
        windows, shares = zip(*stage.mix, strict=True)
        return windows[np.random.default_rng([self.seed, 4, step]).choice(len(windows), p=np.array(shares) / sum(shares))]

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear cool-down (which alone depends on ``steps``); then once more."""
        if step >= self.steps:
            left = (self.all_steps - step) / self.loosening.steps
            return self.loosening_rate * min(1.0, (step - self.steps + 1) / 20, max(0.01, left / 0.6))
        cooling = (self.steps - step) / max(1.0, self.decay * self.steps)
        return self.rate * min(1.0, (step + 1) / self.warmup, max(0.01, cooling))


class BatchStream:
    """Batches drawn a few steps ahead in one background process.

    The shares of the kinds of question follow the current error, so a batch depends on the shares at the time it was
    ordered. ``orders`` keeps those, and with them a resumed run draws the very same batches.
    """

    AHEAD = 6

    def __init__(self, settings: Settings, step: int, orders: list[tuple[float, ...]], shares: tuple[float, ...]) -> None:
        self._settings = settings
        self._next = step
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=be_nice)
        self._queue: deque[tuple[tuple[float, ...], Future[Batch]]] = deque()
        for ordered in orders or [shares] * self.AHEAD:
            self._order(ordered)

    @property
    def orders(self) -> list[tuple[float, ...]]:
        """Shares of the batches that are ordered but not yet taken."""
        return [shares for shares, _ in self._queue]

    def take(self, shares: tuple[float, ...]) -> Batch:
        """The next batch; orders another one with ``shares``."""
        _, future = self._queue.popleft()
        self._order(shares)
        return future.result()

    def close(self) -> None:
        """Stop the background process."""
        self._pool.shutdown(cancel_futures=True)

    def _order(self, shares: tuple[float, ...]) -> None:
        window = self._settings.window(self._next)
        self._queue.append((shares, self._pool.submit(draw_batch, self._settings.seed, self._next, window, shares)))
        self._next += 1


class Trainer:
    """Model, text tower, auxiliary read-outs and optimisers, with the state that makes a run resumable."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model = build_model(settings.dimensions).to(settings.device)
        self.tower = build_text_tower(settings.dimensions).to(settings.device)
        self.readouts = PatchReadouts(settings.dimensions.vision_width, settings.dimensions.decoder_width).to(
            settings.device
        )
        self.modules = nn.ModuleList([self.model, self.tower, self.readouts])
        self.optimizers = optimizers(self.modules, settings.rate)
        self.step = 0
        self.images = 0
        self.seconds = 0.0
        self.accuracy = np.zeros(len(KIND_NAMES))
        self.orders: list[tuple[float, ...]] = []
        # Unfused attention compiles into fewer, larger matrix products than the fused kernel runs on a CPU.
        self.model.set_attn_implementation("eager" if settings.device == "cpu" else "sdpa")
        if settings.compiled:
            torch._dynamo.config.cache_size_limit = 64
            for layer in (*self.model.model.vision_tower.encoder.layers, *self.model.model.language_model.layers):
                layer.compile(dynamic=False)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each kind of question: in proportion to its error, with a floor."""
        weights = 0.12 + (1 - self.accuracy)
        return tuple(float(weight) for weight in weights / weights.sum())

    def run(self, folder: Path, stopping: Callable[[], bool] = lambda: False, checkpoint_minutes: float = 4.0) -> None:
        """Train up to ``settings.all_steps``, or until ``stopping()``, logging to and checkpointing in ``folder``."""
        stream = BatchStream(self.settings, self.step, self.orders, self.shares)
        saved = time.monotonic()
        total = self.settings.all_steps
        try:
            for _ in track(range(self.step, total), "training", total=total, completed=self.step):
                metrics = self.advance(stream.take(self.shares))
                if self.step % 20 == 0:
                    with (folder / "metrics.jsonl").open("a") as log:
                        log.write(json.dumps(metrics) + "\n")
                if stopping():
                    break
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save(folder, stream.orders)
                    self.export(folder / "export")
                    saved = time.monotonic()
            self.save(folder, stream.orders)
        finally:
            stream.close()

    def advance(self, batch: Batch) -> dict[str, object]:
        """One optimisation step; returns the metrics of the step."""
        began = time.monotonic()
        batch = batch.to(self.settings.device)
        rate = self.settings.rate_at(self.step)
        set_rate(self.optimizers, rate)
        with torch.autocast(self.settings.device, torch.bfloat16):
            encoded = encode(self.model, batch)
            logits = answer_logits(self.model, batch, encoded.visual).float() if batch.ids.numel() else None
            images, captions = self.tower.image_embeds(encoded.pooled), self.tower.text_embeds(batch.captions)
        readouts = self.readouts(encoded, self.model.get_input_embeddings().weight, batch)
        matching = _contrastive(images.float(), captions.float(), self.tower.logit_scale)
        answers = matching.new_zeros(())
        if logits is not None:
            answers = nn.functional.cross_entropy(logits, batch.targets[batch.targets >= 0])
            self._note_accuracy(logits, batch)
        loss = answers + self.settings.reading_out * sum(readouts.values()) + self.settings.matching * matching
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        self.images += len(batch.ids)
        self.seconds += time.monotonic() - began
        return {
            "step": self.step,
            "images": self.images,
            "minutes": round(self.seconds / 60, 2),
            "cells": round(batch.cells.shape[1] ** 0.5),
            "rate": rate,
            "answers": round(answers.item(), 4),
            **{name: round(value.item(), 4) for name, value in readouts.items()},
            "matching": round(matching.item(), 4),
            "norm": round(norm.item(), 3),
            "accuracy": {name: round(float(value), 3) for name, value in zip(KIND_NAMES, self.accuracy, strict=True)},
        }

    def save(self, folder: Path, orders: list[tuple[float, ...]]) -> None:
        """Write the run's state atomically."""
        state = {
            "modules": self.modules.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.step, self.images, self.seconds, self.accuracy.tolist(), orders),
        }
        save_state(state, folder)

    def load(self, folder: Path) -> None:
        """Continue where ``save`` stopped."""
        state = torch.load(folder / "state.pt", map_location=self.settings.device)
        self.modules.load_state_dict(state["modules"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.images, self.seconds, accuracy, self.orders = state["progress"]
        self.accuracy = np.array(accuracy)

    def export(self, folder: Path) -> None:
        """Write the Hugging Face checkpoint folder."""
        folder.mkdir(parents=True, exist_ok=True)
        save_checkpoint(self.model, self.tower, folder)
        record = {
            "steps": self.step,
            "images": self.images,
            "minutes": self.seconds / 60,
            "seed": self.settings.seed,
            "machine": machine(self.settings.device),
        }
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    @torch.no_grad()
    def _note_accuracy(self, logits: torch.Tensor, batch: Batch) -> None:
        """Update the running share of wholly right answers of each kind."""
        wrong = logits.argmax(-1) != batch.targets[batch.targets >= 0]
        misses = torch.zeros(len(batch.kinds), device=wrong.device).index_add_(
            0, batch.turns[batch.turns >= 0], wrong.float()
        )
        kinds, right = batch.kinds.cpu().numpy(), (misses == 0).float().cpu().numpy()
        asked = np.bincount(kinds, minlength=len(KIND_NAMES))
        share = np.bincount(kinds, right, len(KIND_NAMES)) / np.maximum(asked, 1)
        pace = np.where(asked > 0, 0.05, 0)
        self.accuracy += pace * (share - self.accuracy)


def train(folder: Path, settings: Settings, stopping: Callable[[], bool] = lambda: False) -> Trainer:
    """Train in ``folder``, continuing a run that is there, and export the checkpoint to ``folder/export``."""
    folder.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(settings)
    if (folder / "state.pt").exists():
        trainer.load(folder)
    trainer.run(folder, stopping)
    trainer.export(folder / "export")
    return trainer


def _contrastive(images: torch.Tensor, captions: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric CLIP loss for unit vectors ``[B, projection]``."""
    logits = scale.exp().clamp(max=100) * images @ captions.T
    target = torch.arange(len(logits), device=logits.device)
    return (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2


def optimizers(modules: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside layers, AdamW for embeddings, norms, biases and scalars."""
    matrices, others, plain = [], [], []
    for name, parameter in _named_parameters(modules):
        if parameter.ndim == 2 and "embed" not in name and "nothing" not in name:
            matrices.append(parameter)
        elif parameter.ndim >= 2:
            others.append(parameter)
        else:
            plain.append(parameter)
    return [
        Muon(matrices, lr=rate),
        torch.optim.AdamW(
            [{"params": others, "weight_decay": 0.01}, {"params": plain, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
            fused=True,
        ),
    ]


def _named_parameters(modules: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return modules.named_parameters(remove_duplicate=True)


def set_rate(optimizers: Iterable[torch.optim.Optimizer], rate: float) -> None:
    """Give all parameters the learning rate of a step."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate


def save_state(state: dict[str, object], folder: Path) -> None:
    """Write a run's ``state.pt`` at once or not at all."""
    torch.save(state, folder / "state.tmp")
    os.replace(folder / "state.tmp", folder / "state.pt")


def machine(device: str) -> str:
    """What a run trains on, in words."""
    return f"{os.cpu_count()} CPU cores" if device == "cpu" else torch.cuda.get_device_name()


def be_nice() -> None:
    """Scene drawing gives way to the training process and stays on one thread."""
    os.nice(2)
    torch.set_num_threads(1)
