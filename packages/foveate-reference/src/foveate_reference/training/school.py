"""Training of the larger reference models by lessons, seeded and resumable, on CPU or GPU.

``python -m foveate_reference extend``.
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor, nn
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as qwen

from foveate.reference.model import IMAGE, Dimensions
from foveate.reference.published import respell

from .attention import PACKED, attend
from .extended import IDS, KINDS, LINES, start_from
from .lessons import IGNORE, NAMES, Batch, Lesson, draw_batch
from .teacher import Imitation
from .train import be_nice, machine, optimizers, save_state, set_rate
from .windows import packed_mask


@dataclass(frozen=True)
class Course:
    """What a model learns: lessons in small pictures, later in large ones, too."""

    small: tuple[Lesson, ...]
    large: tuple[Lesson, ...]


def _lessons(side: int, pictures: int, text: int, *tasks: str) -> tuple[Lesson, ...]:
    return tuple(Lesson(task, side, pictures, text) for task in tasks)


_FIRST = ("spine", "spine", "characters", "characters", "characters", "glance", "glance", "glance")
"""So often, because reading is learnt last."""
_FIELDS = ("glance", "document", "chart", "screen", "dense", "needle", "relation", "caption", "dialogue")

_LOOKED_AT = ("spine", "document", "chart", "screen", "dense")
"""The lessons whose pictures hold everything that there is to see."""

COURSES = {
    "tiles": Course(
        small=(
            *_lessons(96, 16, 72, "spine", "spine", "characters", "characters", "glance", *_FIELDS),
            *_lessons(96, 8, 72, "compare"),
        ),
        large=_lessons(192, 8, 112, *_FIELDS, *_FIELDS),
    ),
    "qwen": Course(
        small=(
            *_lessons(96, 48, 72, *_FIRST, *_FIELDS),
            *_lessons(96, 32, 72, "compare"),
            *_lessons(96, 16, 72, "events", "moment"),
            *_lessons(96, 8, 48, "stream"),
        ),
        large=_lessons(192, 20, 112, *_FIELDS, *_FIELDS),
    ),
}


@dataclass(frozen=True)
class Settings:
    """Everything a run depends on.

    ``start``: the checkpoints whose weights it begins with, later ones on top. ``gain``: factor on what the projector gives
    at the start; a decoder reads visual tokens as long as those it learnt to read at once, hardly any that are much shorter.
    ``teacher``: a checkpoint with a CLIP tower for the qwen model's to imitate. ``looking``: steps at the beginning in which
    the vision tower learns alone. ``large_from``: share of the steps after which large pictures come, too.
    """

    kind: str
    steps: int
    start: tuple[Path, ...]
    seed: int = 0
    rate: float = 2e-3
    warmup: int = 60
    decay: float = 0.4
    reading_out: float = 0.2
    gain: float = 1.0
    teacher: Path | None = None
    looking: int = 0
    large_from: float = 0.15
    dimensions: Dimensions = field(default_factory=Dimensions)
    device: str = "cpu"

    def rate_at(self, step: int) -> float:
        """Learning rate: linear warm-up, constant, linear cool-down."""
        return self.rate * min(1.0, (step + 1) / self.warmup, max(0.01, (self.steps - step) / (self.decay * self.steps)))

    def lesson(self, step: int, accuracy: dict[str, float]) -> Lesson:
        """The lesson of a step: most often what half succeeds; seldom what is known or out of reach."""
        course = COURSES[self.kind]
        lessons = course.small + (course.large if step >= self.large_from * self.steps else ())
        if step < self.looking:
            lessons = tuple(lesson for lesson in course.small if lesson.task in _LOOKED_AT)
        right = np.array([accuracy.get(name_of(lesson), 0.0) for lesson in lessons])
        weights = 0.5 + 3 * right * (1 - right)
        rng = np.random.default_rng([self.seed, 6, step])
        return lessons[rng.choice(len(lessons), p=weights / weights.sum())]


def name_of(lesson: Lesson) -> str:
    """Task and size."""
    return f"{lesson.task}{lesson.side}"


class Pupil(nn.Module):
    """The model and what reads its visual tokens while it learns; nothing but the model is in the checkpoint.

    *Words*: a visual token should read as the words for what it shows and where it is, by cosine with the decoder's own word
    embeddings. *Cells*: shape, colour and character of each cell that went into it, by free linear maps.
    """

    def __init__(self, kind: str, model: Any, width: int, teacher: Path | None = None) -> None:
        super().__init__()
        self.kind, self.model = kind, model
        self.cells = 1 if KINDS[kind].tiled else 4
        self.nothing = nn.Parameter(torch.randn(3, width) * 0.02)
        self.scale = nn.Parameter(torch.tensor(2.3))
        self.imitation = Imitation(model.model.visual, teacher) if teacher else None
        self.lines = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(2))
        self.classes = nn.ModuleList(nn.Linear(width, self.cells * (len(names) + 1)) for names in NAMES)
        named = (*NAMES, [f"row{i}" for i in range(1, LINES + 1)], [f"col{i}" for i in range(1, LINES + 1)])
        for number, names in enumerate(named):
            self.register_buffer(f"words_{number}", torch.tensor([IDS[name] for name in names]), persistent=False)

    def forward(self, batch: Batch, looking: bool = False) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Logits ``[targets, vocabulary]`` in row order (None while ``looking``), and losses of the read-outs by name."""
        inner: Any = self.model.model
        seen = inner.get_image_features(**batch.vision)
        features = seen.pooler_output
        visual = torch.stack(list(features)).view(len(batch.ids), -1, features[0].shape[-1])
        table = self.model.get_input_embeddings().weight
        losses = self._readouts(visual.float(), batch, table.detach() if looking else table)
        if self.imitation is not None:
            losses |= self.imitation(batch.vision, seen.last_hidden_state, batch.shown.flatten(0, 1))
        return None if looking else self._answers(batch, visual), losses

    def _answers(self, batch: Batch, visual: Tensor) -> Tensor:
        inner: Any = self.model.model
        decoder, rows = inner.language_model, len(batch.ids)
        ids = torch.cat([batch.prefix.expand(rows, -1), batch.ids], 1)
        embeds = decoder.embed_tokens(ids)
        pictured = (batch.prefix == IDS[IMAGE]).nonzero()[:, 0]
        embeds = embeds.index_copy(1, pictured, visual.to(embeds.dtype))
        before = self._prefix_positions(batch)
        behind = before.amax() + 1 + batch.places
        positions = torch.cat([before[:, None].expand(-1, rows, -1), behind.expand(len(before), -1, -1)], 2)
        seen = packed_mask(batch.blocks, len(batch.prefix))[:, :, len(batch.prefix) :]
        mask = embeds.new_zeros(()).masked_fill(~seen, -1e4)
        rotary = decoder.rotary_emb(embeds, positions if len(positions) > 1 else positions[0])
        hidden = embeds
        for layer in decoder.layers:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotary)
        text = hidden[:, len(batch.prefix) :]
        return self.model.lm_head(decoder.norm(text[batch.targets >= 0]))

    def _prefix_positions(self, batch: Batch) -> Tensor:
        """``[1 or 3, P]``."""
        if KINDS[self.kind].tiled:
            return torch.arange(len(batch.prefix), device=batch.ids.device)[None]
        ids = batch.prefix[None]
        grids = batch.vision["image_grid_thw"][: int((ids == IDS[KINDS["qwen"].around[0]]).sum())]
        inner: Any = self.model.model
        return inner.get_rope_index(ids, (ids == IDS[IMAGE]).int(), image_grid_thw=grids)[0][:, 0]

    def _readouts(self, visual: Tensor, batch: Batch, table: Tensor) -> dict[str, Tensor]:
        losses = {}
        for number, name in enumerate(("shape", "colour", "character")):
            words = torch.cat([table[self.get_buffer(f"words_{number}")], self.nothing[number : number + 1]])
            if self.cells == 1 or name != "character":
                # Of a token with several cells one that shows something names it; characters stand side by side there.
                losses[f"{name}_word"] = _loss(self._cosines(visual, words), batch.names[number].amin(-1))
            # Features are long vectors, and nothing trained these maps for them.
            normed = nn.functional.layer_norm(visual, visual.shape[-1:])
            classes = self.classes[number](normed).unflatten(-1, (self.cells, -1))
            losses[f"{name}_class"] = _loss(classes, batch.names[number])
        for number, (line, at) in enumerate(zip(self.lines, (batch.rows, batch.columns), strict=True), start=3):
            logits = self._cosines(line(visual), table[self.get_buffer(f"words_{number}")])
            losses[("row", "column")[number - 3]] = nn.functional.cross_entropy(logits.flatten(0, 1), at.flatten())
        return losses

    def _cosines(self, features: Tensor, classes: Tensor) -> Tensor:
        return self.scale.exp() * nn.functional.normalize(features, dim=-1) @ nn.functional.normalize(classes, dim=-1).T


class Schooling:
    """A pupil, its optimisers, and the state that makes a run resumable."""

    AHEAD = 4

    def __init__(self, settings: Settings) -> None:
        from transformers import AutoModelForImageTextToText

        torch.manual_seed(settings.seed)
        self.settings = settings
        model = KINDS[settings.kind].build(settings.dimensions)
        for folder in settings.start:
            start_from(model, AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
        with torch.no_grad():
            for parameter in KINDS[settings.kind].projector(model).parameters():
                parameter *= settings.gain
        self.pupil = Pupil(settings.kind, model, settings.dimensions.decoder_width, settings.teacher).to(settings.device)
        self.optimizers = optimizers(self.pupil, settings.rate)
        self.step, self.pictures, self.seconds = 0, 0, 0.0
        self.accuracy: dict[str, float] = {}
        self.orders: list[Lesson] = []
        model.set_attn_implementation(PACKED)
        if not KINDS[settings.kind].tiled:
            for block in model.model.visual.blocks:
                block.attn.forward = _attend_in_equal_windows.__get__(block.attn)

    def run(self, folder: Path, stopping: Callable[[], bool] = lambda: False, checkpoint_minutes: float = 5.0) -> None:
        """Train up to ``settings.steps``, or until ``stopping()``, logging to and checkpointing in ``folder``."""
        total, saved = self.settings.steps, time.monotonic()
        with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=be_nice) as pool:
            queue: deque[tuple[Lesson, Future[Batch]]] = deque()

            def order(lesson: Lesson) -> None:
                number = self.step + len(queue)
                queue.append((lesson, pool.submit(draw_batch, self.settings.kind, lesson, self.settings.seed, number)))

            for number in range(self.AHEAD):
                ordered = self.orders[number : number + 1]
                order(ordered[0] if ordered else self.settings.lesson(self.step + number, self.accuracy))
            for _ in track(range(self.step, total), "training", total=total, completed=self.step):
                lesson, future = queue.popleft()
                metrics = self.advance(future.result(), lesson)
                order(self.settings.lesson(self.step + len(queue), self.accuracy))
                if self.step % 20 == 0:
                    with (folder / "metrics.jsonl").open("a") as log:
                        log.write(json.dumps(metrics) + "\n")
                if stopping():
                    break
                if time.monotonic() - saved > 60 * checkpoint_minutes:
                    self.save(folder, [each for each, _ in queue])
                    saved = time.monotonic()
            self.save(folder, [each for each, _ in queue])
            pool.shutdown(cancel_futures=True)

    def advance(self, batch: Batch, lesson: Lesson) -> dict[str, object]:
        """One optimisation step; returns its metrics."""
        began = time.monotonic()
        batch = batch.to(self.settings.device)
        set_rate(self.optimizers, self.settings.rate_at(self.step))
        with torch.autocast(self.settings.device, torch.bfloat16):
            logits, readouts = self.pupil(batch, self.step < self.settings.looking)
        answers = torch.zeros((), device=self.settings.device)
        if logits is not None:
            answers = nn.functional.cross_entropy(logits.float(), batch.targets[batch.targets >= 0])
        (answers + self.settings.reading_out * torch.stack(list(readouts.values())).sum()).backward()
        norm = nn.utils.clip_grad_norm_(self.pupil.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step, self.pictures = self.step + 1, self.pictures + len(batch.ids)
        if logits is not None:
            self._note_accuracy(logits, batch, name_of(lesson))
        self.seconds += time.monotonic() - began
        return {
            "step": self.step,
            "pictures": self.pictures,
            "minutes": round(self.seconds / 60, 2),
            "lesson": name_of(lesson),
            "answers": round(answers.item(), 4),
            **{name: round(value.item(), 4) for name, value in readouts.items()},
            "norm": round(norm.item(), 3),
            "accuracy": {name: round(share, 3) for name, share in sorted(self.accuracy.items())},
        }

    def save(self, folder: Path, orders: list[Lesson]) -> None:
        """Write the run's state atomically, and the checkpoint as it is now."""
        state = {
            "pupil": self.pupil.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "progress": (self.step, self.pictures, self.seconds, self.accuracy, [vars(each) for each in orders]),
        }
        save_state(state, folder)
        self.export(folder / "export")

    def load(self, folder: Path) -> None:
        """Continue where ``save`` stopped."""
        state = torch.load(folder / "state.pt", map_location=self.settings.device)
        self.pupil.load_state_dict(state["pupil"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.pictures, self.seconds, self.accuracy, orders = state["progress"]
        self.orders = [Lesson(**each) for each in orders]

    def export(self, folder: Path) -> None:
        """Write the Hugging Face checkpoint folder, weights in bfloat16."""
        folder.mkdir(parents=True, exist_ok=True)
        model: Any = KINDS[self.settings.kind].build(self.settings.dimensions)
        model.load_state_dict(self.pupil.model.state_dict())
        model.to(torch.bfloat16).save_pretrained(folder)
        respell(folder)
        KINDS[self.settings.kind].processor().save_pretrained(folder)
        stage = {
            "kind": self.settings.kind,
            "steps": self.step,
            "pictures": self.pictures,
            "minutes": round(self.seconds / 60, 1),
            "rate": self.settings.rate,
            "gain": self.settings.gain,
            "looking": self.settings.looking,
            "seed": self.settings.seed,
            "machine": machine(self.settings.device),
        }
        earlier = [each for start in self.settings.start for each in stages(start)]
        (folder / "training.json").write_text(json.dumps({"stages": [*earlier, stage]}, indent=2) + "\n")

    @torch.no_grad()
    def _note_accuracy(self, logits: Tensor, batch: Batch, name: str) -> None:
        """Update the running share of wholly right answers."""
        wanted = batch.targets >= 0
        wrong = (logits.argmax(-1) != batch.targets[wanted]).float()
        count = int(batch.turns.max()) + 1
        misses = torch.zeros(count, device=wrong.device).index_add_(0, batch.turns[wanted], wrong)
        right = (misses == 0).float().mean().item()
        known = self.accuracy.get(name, right)
        self.accuracy[name] = known + 0.1 * (right - known)


def stages(folder: Path) -> list[dict[str, Any]]:
    """How the checkpoint in a folder was trained, first things first; nothing for the small reference model."""
    record = folder / "training.json"
    found: list[dict[str, Any]] = json.loads(record.read_text()).get("stages", []) if record.is_file() else []
    return found


def school(folder: Path, settings: Settings, stopping: Callable[[], bool] = lambda: False) -> Schooling:
    """Train in ``folder``, continuing a run that is there; the checkpoint is ``folder/export``."""
    folder.mkdir(parents=True, exist_ok=True)
    schooling = Schooling(settings)
    if (folder / "state.pt").exists():
        schooling.load(folder)
    schooling.run(folder, stopping)
    return schooling


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy for ``logits`` ``[..., classes]`` whose last class means nothing, which most cells show."""
    balance = torch.ones(logits.shape[-1], device=logits.device)
    balance[-1] = 0.2
    return nn.functional.cross_entropy(logits.flatten(0, -2), target.flatten(), balance, ignore_index=IGNORE)


def _attend_in_equal_windows(
    self: Any, hidden_states: Tensor, cu_seqlens: Tensor, position_embeddings: tuple[Tensor, Tensor], **_: Any
) -> Tensor:
    """What Qwen2.5-VL's encoder attention computes, for windows of one size, which need no loop."""
    rows, windows = len(hidden_states), len(cu_seqlens) - 1
    query, key, value = self.qkv(hidden_states).reshape(rows, 3, self.num_heads, -1).unbind(1)
    query, key = qwen.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
    parts = (each.reshape(windows, rows // windows, self.num_heads, -1).transpose(1, 2) for each in (query, key, value))
    query, key, value = (part.to(value.dtype) for part in parts)
    out = attend(query * self.scaling, key, value)
    return self.proj(out.transpose(1, 2).reshape(rows, -1))
