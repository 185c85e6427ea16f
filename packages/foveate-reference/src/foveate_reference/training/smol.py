"""Training of ``reference-smol``: SmolLM2 learns to see through the vision tower of the small reference model.

The tower stays as it is. First the projector alone is fitted, without a language model: each patch is to land on the input
embeddings of the words for what it shows, which are known exactly. Then answers are learnt, by the projector before a frozen
language model, and last by projector and low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685) on all of its linears.
Many questions are packed behind one picture: each sees the picture and itself only.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from foveate.checkpoint import reference_smol
from foveate.checkpoint.reference_smol import Adapter
from foveate.tasks.scenes import COLOURS, LETTERS, SHAPES, Scene, draw_scene
from foveate.tasks.spine import KINDS

from .batches import IGNORE, KIND_NAMES, patch_names
from .train import machine

_EASY = ("colour", "shape", "existence")


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on.

    ``scenes`` and ``fitting``: pictures and steps of the projector's fit; ``looking``: steps of the projector before the
    frozen language model; ``steps``: those with adapters of ``rank``. The learning ``rate`` falls over the last share
    ``cooling`` of them. ``images`` a step, each with ``text`` tokens of questions and answers, of which the share ``hard``
    is about counting, position and reading, the rest about attribute, shape and existence.
    """

    scenes: int = 3000
    fitting: int = 1200
    looking: int = 80
    steps: int = 600
    images: int = 3
    text: int = 224
    rank: int = 8
    rate: float = 1e-3
    cooling: float = 0.6
    hard: float = 0.4
    seed: int = 0


@dataclass(frozen=True)
class Packed:
    """Questions behind pictures: ``B`` pictures, ``T`` tokens.

    ``pixels`` uint8 ``[B, side, side, 3]``; ``ids``, ``blocks`` (which question a token belongs to, 0 for padding),
    ``positions`` behind the picture, ``targets`` (the next token where it is part of an answer, else ``IGNORE``) and
    ``kinds`` (of the question, where a target stands): ``[B, T]``.
    """

    pixels: Tensor
    ids: Tensor
    blocks: Tensor
    positions: Tensor
    targets: Tensor
    kinds: Tensor


class Student:
    """The model in training, of parts: tower, projector, language model, and what is learnt of it."""

    def __init__(self, settings: Settings) -> None:
        torch.manual_seed(settings.seed)
        self.settings = settings
        self.model, self.processor = reference_smol.bare()
        self.model.requires_grad_(False)
        self.projector = self.model.model.multi_modal_projector.requires_grad_(True)
        self.decoder = self.model.model.language_model
        self.adapters: dict[str, Adapter] = {}
        self.words: Tensor = self.decoder.embed_tokens.weight
        template = self.processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "?"}]}], add_generation_prompt=True
        )
        before, self.between = template.split(self.processor.image_token)
        self.before = torch.tensor(self._tokens(before))
        width = self.model.config.vision_config.hidden_size
        self.mean, self.std = torch.zeros(width), torch.ones(width)
        self.error = np.ones(len(KIND_NAMES))

    def _tokens(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.no_grad()
    def features(self, pixels: Tensor) -> Tensor:
        """What the projector learns from, at unit scale: pixels ``[B, side, side, 3]`` to ``[B, patches, width]``."""
        images = self.processor.image_processor
        mean, std = (255 * torch.tensor(values) for values in (images.image_mean, images.image_std))
        hidden = self.model.model.vision_tower(
            pixel_values=((pixels - mean) / std).permute(0, 3, 1, 2), output_hidden_states=True
        ).hidden_states
        return (hidden[self.model.config.vision_feature_layer][:, 1:] - self.mean) / self.std

    def fit(self) -> float:
        """The projector onto words; returns the share of things' patches that are nearest to their own shape and colour."""
        settings, rng = self.settings, np.random.default_rng([self.settings.seed, 5])
        drawn = [draw_scene(rng) for _ in range(settings.scenes)]
        names = torch.from_numpy(np.stack([patch_names(scene) for scene in drawn], 1)).flatten(1)
        rows = torch.cat(
            [self.features(torch.from_numpy(np.stack([s.pixels for s in drawn[i : i + 100]]))).flatten(0, 1)
             for i in range(0, len(drawn), 100)]
        )  # fmt: skip
        # A tower's hidden states are far from unit scale, and from zero.
        self.mean, self.std = rows.mean(0), rows.std(0)
        rows = (rows - self.mean) / self.std
        table = self._word_table()
        weights = torch.where(_blank(names), 0.2, 1.0)[:, None]
        optimizer = torch.optim.AdamW(self.projector.parameters(), weight_decay=0)
        for step in track(range(settings.fitting), "fitting"):
            chosen = torch.from_numpy(rng.integers(len(rows), size=4096))
            off = self.projector(rows[chosen]) - self._named(table, names[:, chosen])
            loss = (weights[chosen] * off.square()).mean() / table[0][:-1].var()
            _step(optimizer, loss, 2e-3 * max(0.01, 1 - step / settings.fitting))
        return self._nearest(table, rows[-100_000:], names[:, -100_000:])

    def _word_table(self) -> list[Tensor]:
        """Embeddings of shapes, colours, letters and ground, beside the mean of all words; a row of zeros behind each."""
        words = (tuple(SHAPES), tuple(COLOURS), tuple(letter.upper() for letter in LETTERS), ("background",))
        means = [torch.stack([self.words[self._tokens(f" {word}")].mean(0) for word in group]) for group in words]
        centre = self.words.mean(0)
        return [torch.cat([mean - centre, torch.zeros_like(mean[:1])]) for mean in means]

    def _named(self, table: list[Tensor], names: Tensor) -> Tensor:
        shape, colour, letter = (rows[index] for rows, index in zip(table, names, strict=False))
        return self.words.mean(0) + torch.where(_blank(names)[:, None], table[3][0], shape + colour + letter)

    @torch.no_grad()
    def _nearest(self, table: list[Tensor], rows: Tensor, names: Tensor) -> float:
        things = names[0] < len(SHAPES)
        pairs = (table[0][:-1, None] + table[1][None, :-1]).flatten(0, 1) + self.words.mean(0)
        nearest = torch.cdist(self.projector(rows[things]), pairs).argmin(-1)
        return float(nearest.eq(names[0, things] * len(COLOURS) + names[1, things]).float().mean())

    def adapt(self) -> None:
        """Put an adapter on every linear of the decoder."""
        self.adapters = reference_smol.adapters(self.decoder, self.settings.rank)

    def resume(self, folder: Path) -> None:
        """Begin with what an earlier run saved instead of the fit."""
        learned = load_file(folder / reference_smol.FILE)
        rng = np.random.default_rng([self.settings.seed, 5])
        rows = self.features(torch.from_numpy(np.stack([draw_scene(rng).pixels for _ in range(200)]))).flatten(0, 1)
        self.adapt()
        with torch.no_grad():
            for name, value in [
                *self.projector.named_parameters(prefix="projector"),
                *reference_smol.factors(self.adapters).items(),
            ]:
                value.copy_(learned[name])
            first = self.projector.linear_1
            self.mean, self.std = rows.mean(0), rows.std(0)
            first.bias += first.weight @ self.mean
            first.weight *= self.std

    def answer_losses(self, packed: Packed) -> tuple[Tensor, Tensor]:
        """Nats of each answer token, and which tokens are right: ``[targets]``."""
        visual = self.projector(self.features(packed.pixels))
        before = self.words[self.before].expand(len(visual), -1, -1)
        rows = torch.cat([before, visual, self.words[packed.ids]], 1)
        seen = rows.shape[1] - packed.ids.shape[1]
        blocks = nn.functional.pad(packed.blocks, (seen, 0), value=-1)
        pairs = (blocks[:, :, None] == blocks[:, None]) | (blocks[:, None] == -1)
        positions = torch.cat([torch.arange(seen).expand(len(rows), -1), packed.positions + seen], 1)
        hidden = self.decoder(
            inputs_embeds=rows,
            attention_mask=(pairs & torch.ones_like(pairs[0]).tril())[:, None],
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state[:, seen:]
        asked = packed.targets != IGNORE
        logits = hidden[asked] @ self.words.T
        targets = packed.targets[asked]
        return cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets

    def learn(self, steps: int, first: int) -> Iterator[dict[str, Any]]:
        """Learn answers for so many steps, of which ``first`` have gone before; yields the metrics of each."""
        learning = [*self.projector.parameters(), *(p for each in self.adapters.values() for p in each.parameters())]
        optimizer = torch.optim.AdamW(learning, weight_decay=0, betas=(0.9, 0.98))
        for step in range(steps):
            began = time.monotonic()
            packed = self.draw(np.random.default_rng([self.settings.seed, 6, first + step]), self.settings.images)
            losses, right = self.answer_losses(packed)
            left = (steps - step) / steps
            loss = losses.mean()
            _step(optimizer, loss, self.settings.rate * min(1.0, (step + 1) / 20, max(0.02, left / self.settings.cooling)))
            kinds = packed.kinds[packed.kinds >= 0]
            for kind in kinds.unique().tolist():
                wrong = 1 - right[kinds == kind].float().mean().item()
                self.error[kind] += 0.1 * (wrong - self.error[kind])
            yield {
                "step": first + step + 1,
                "seconds": round(time.monotonic() - began, 2),
                "loss": round(loss.item(), 4),
                "wrong": {name: round(float(e), 3) for name, e in zip(KIND_NAMES, self.error, strict=True)},
            }

    def draw(self, rng: np.random.Generator, images: int) -> Packed:
        """Pictures, each with questions of all kinds, those that are answered wrongly more often."""
        easy = np.array([name in _EASY for name in KIND_NAMES])
        weights, hard = 0.1 + self.error, self.settings.hard
        shares = np.where(easy, (1 - hard) * weights / weights[easy].sum(), hard * weights / weights[~easy].sum())
        scenes = [draw_scene(rng) for _ in range(images)]
        arrays = {name: np.zeros((images, self.settings.text), np.int64) for name in ("ids", "blocks", "positions")}
        arrays |= {name: np.full_like(arrays["ids"], fill) for name, fill in (("targets", IGNORE), ("kinds", -1))}
        for row, scene in enumerate(scenes):
            self._fill({name: array[row] for name, array in arrays.items()}, scene, rng, shares)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return Packed(torch.from_numpy(np.stack([scene.pixels for scene in scenes])), **tensors)

    def _fill(self, row: dict[str, np.ndarray], scene: Scene, rng: np.random.Generator, shares: np.ndarray) -> None:
        at, seen = 0, set()
        for kind in rng.choice(len(KIND_NAMES), size=60, p=shares):
            asked = KINDS[KIND_NAMES[kind]](scene, rng, (0, 0))
            if asked is None or asked.prompt in seen:
                continue
            seen.add(asked.prompt)
            question = self._tokens(self.between.replace("?", asked.prompt, 1))
            answer = [*self._tokens(asked.answer), self.processor.tokenizer.eos_token_id]
            asking, stop = at + len(question), at + len(question) + len(answer)
            if stop > self.settings.text:
                break
            row["ids"][at:stop] = question + answer
            row["blocks"][at:stop] = len(seen)
            row["positions"][at:stop] = np.arange(stop - at)
            row["targets"][asking - 1 : stop - 1] = answer
            row["kinds"][asking - 1 : stop - 1] = kind
            at = stop

    def save(self, folder: Path) -> None:
        """What was learnt, as it is shipped: the projector takes the tower's states as they are."""
        plain = deepcopy(self.projector)
        with torch.no_grad():
            plain.linear_1.weight /= self.std
            plain.linear_1.bias -= plain.linear_1.weight @ self.mean
        reference_smol.save(plain, self.adapters, folder)


def train(folder: Path, settings: Settings, start: Path | None = None) -> None:
    """Train in three parts, or in the last alone from ``start`` on, with a log and what is learnt in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    student = Student(settings)
    nearest = None
    if start is None:
        nearest = round(student.fit(), 3)
    else:
        student.resume(start)
    earlier = [] if start is None else json.loads((start / "training.json").read_text())["stages"]

    def save(steps: int) -> None:
        student.save(folder)
        minutes = round((time.monotonic() - began) / 60)
        stage = asdict(settings) | {"nearest": nearest, "steps": steps, "minutes": minutes}
        record = {"machine": machine("cpu"), "stages": [*earlier, stage]}
        (folder / "training.json").write_text(json.dumps(record, indent=2) + "\n")

    with (folder / "metrics.jsonl").open("w") as log:
        parts = ((settings.looking, 0), (settings.steps, settings.looking)) if start is None else ((settings.steps, 0),)
        for steps, first in parts:
            if first:
                student.adapt()
            for metrics in track(student.learn(steps, first), "learning", total=steps):
                log.write(json.dumps(metrics) + "\n")
                log.flush()
                if metrics["step"] % 50 == 0:
                    save(max(0, metrics["step"] - parts[-1][1]))
    save(settings.steps)


def _blank(names: Tensor) -> Tensor:
    """Which patches show neither a thing nor a letter."""
    return (names[0] == len(SHAPES)) & (names[2] == len(LETTERS))


def _step(optimizer: torch.optim.Optimizer, loss: Tensor, rate: float) -> None:
    optimizer.zero_grad()
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = rate
        nn.utils.clip_grad_norm_(group["params"], 1.0)
    optimizer.step()
