"""How far each method that replaces weights takes the reference models from their floats, at which size.

    python -m benchmarks.quantization --minutes 60      # begins nothing new after that; goes on when started again
    python -m benchmarks.quantization --only speed      # times of whole models, on an idle machine
    python -m benchmarks.quantization --page            # only writes the page anew

A cell is a model, healthy or with planted outliers (`benchmarks.sick`), a method, a setting of bits, and a seed of the
calibration samples. Every registered method that replaces weights has a row, so the same command adds what comes later.
Questions are answered by the right answer: each of its words and its end is predicted from the right ones before it. What is
noted is, question by question, how far the distribution is from the float model's (KL(float || quantized), mean over
these words), in which share of them the likeliest word is the same, and whether all likeliest ones are right, which is when
greedy decoding gives that answer. `QUANTIZED_BY` is also measured beside `PRUNED_BY`, at several budgets of each. Times are
those of `benchmarks.quantization_speed`. Writes docs/quantization-results.json after every cell, which several such
commands may do at once, and docs/quantization-results.md at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any, Literal

import torch
from benchmarks.quantization_page import page
from benchmarks.quantization_speed import Speed
from benchmarks.sick import sick
from torch import Tensor

import foveate
from foveate import checkpoint, tasks
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.weights import Weights
from foveate.engine.stand_in import stand_in
from foveate.models import anatomy
from foveate.ops.divergence import divergence

OUT = Path(__file__).parent.parent / "docs" / "quantization-results.json"
MODELS = ("reference-qwen", "reference", "reference-tiles")
EACH, SAMPLES, BATCH = 8, 4, 12
"""Questions of each spine task, calibration samples of each, and how many run at once."""
SEEDS = (0, 1, 2)
SETTINGS: dict[str, dict[str, Any]] = {
    "W4": dict(bits=4),
    "W4 g64": dict(bits=4, group_size=64),
    "W3": dict(bits=3),
    "W3 g64": dict(bits=3, group_size=64),
    "W2": dict(bits=2),
    "W2 g64": dict(bits=2, group_size=64),
    "W4A8": dict(bits=4, activations=8),
    "W4A4": dict(bits=4, activations=4),
}
ACTIVATIONS = ("W4A8", "W4A4")
"""Settings that round inputs as well; the only ones in which `smoothquant` does anything that is its own."""
VARIANTS: dict[str, tuple[str, ...]] = {
    "rtn": ("rtn", "rtn(clip=True)"),
    "mbq": ("mbq(clip=True)",),
    "qig": ("qig(clip=True)",),
    "vlm_ptq": ("vlm_ptq(mu_search='rtn')",),
    "dasq": ("dasq(density=0.0)", "dasq", "dasq(by_row=True)"),
    # The paper's 20,000 steps for each block take hours.
    "ls_vit": ("ls_vit(steps=100)", "ls_vit(steps=100, curvature='none')", "ls_vit(steps=0)"),
}
"""How methods are run whose defaults are not what is to be compared; all others as they are."""
SLOW = ("ls_vit",)
"""Those of which little is measured before all others are."""
TELLING = ("W2", "W4A4", "W3", "W2 g64")
"""Settings in which methods differ most; the others follow."""


@dataclass(frozen=True)
class Cell:
    """What is measured at once."""

    model: str
    sick: bool
    method: str
    setting: str
    seed: int
    keep: float | None = None

    @property
    def key(self) -> str:
        """Of its record."""
        return json.dumps([self.model, self.sick, self.method, self.setting, self.seed, self.keep])


def variants() -> Iterator[tuple[str, type[Weights]]]:
    """Each row of the table, with its class: every registered method that replaces weights."""
    for name, kind in registry.methods().items():
        if issubclass(kind, Weights):
            for text in VARIANTS.get(name, (name,)):
                yield text, kind


def method_of(text: str, setting: str) -> Weights | None:
    """The method in a setting, on symmetric grids; None where it knows no such thing."""
    given = Recipe.of(text).methods[0]
    wanted = {"group_size": -1, "symmetric": True, "activations": 16} | SETTINGS[setting]
    if given.name == "smoothquant" and setting not in ACTIVATIONS:
        return None
    try:
        made = replace(given, **wanted)
    except FoveateError:
        return None
    assert isinstance(made, Weights)
    return made


def cells(models: Sequence[str]) -> Iterator[Cell]:
    """All of them, the most telling first: where methods differ most, and on models with short prompts."""
    quick, long = [one for one in models if one in MODELS[:2]], [one for one in models if one not in MODELS[:2]]
    stages: tuple[tuple[bool, Sequence[str], Sequence[str], Sequence[int]], ...] = (
        (False, quick, TELLING[:3], SEEDS[:1]),
        (False, quick[:1], tuple(SETTINGS), SEEDS[:1]),
        (True, quick[:1], TELLING[:3], SEEDS[:1]),
        (False, long, TELLING[:3], SEEDS[:1]),
        (False, models, tuple(SETTINGS), SEEDS),
        (True, models, tuple(SETTINGS), SEEDS),
    )
    rows = sorted(variants(), key=lambda row: len(row[1].streams))
    for slow, some, settings, seeds in stages:
        for seed, model, ill, setting, (text, kind) in product(seeds, some, (True, False), settings, rows):
            wanted = (kind.name in SLOW) == slow and (seed == 0 or kind.streams)
            if wanted and method_of(text, setting) is not None:
                yield Cell(model, ill, text, setting, seed)


WHERE = f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"
"""What torch's kernels may use here."""
WEIGHTS = ("floats", "W4 g64", "W3", "W2")
KEEPS = (1.0, 0.5, 0.22, 0.11)
QUANTIZED_BY, PRUNED_BY = "vlm_ptq(mu_search='rtn')", "hiprune"


def together(models: Sequence[str]) -> Iterator[Cell]:
    """Weights of fewer bits, and fewer visual tokens, each alone and both."""
    for model in models[:2]:
        for setting in WEIGHTS:
            for keep in KEEPS:
                yield Cell(model, False, QUANTIZED_BY, setting, 0, keep)


@dataclass
class Subject:
    """A model that is asked questions, its floats' answers, and what its encoder made of them."""

    name: str
    sick: bool
    _remembered: dict[tuple[int, ...], Any] = field(default_factory=dict)

    @cached_property
    def loaded(self) -> checkpoint.Checkpoint:
        """The model."""
        loaded = checkpoint.load(self.name, "cpu", "float32")
        if not self.sick:
            return loaded
        copied = sick(loaded.model, self._asked(loaded, SAMPLES, 9, "validation"))
        return checkpoint.Checkpoint(loaded.name, copied, loaded.processor)

    @cached_property
    def questions(self) -> list[dict[str, Tensor]]:
        """Prompts with their right answers, in batches."""
        return self._asked(self.loaded, EACH, 0, "test")

    def samples(self, seed: int) -> list[dict[str, Tensor]]:
        """For calibration: others for each seed."""
        return self._asked(self.loaded, SAMPLES, seed, "validation")

    def _asked(self, loaded: checkpoint.Checkpoint, each: int, seed: int, split: str) -> list[dict[str, Tensor]]:
        asked = [one for task in tasks.SPINE for one in tasks.questions(task, each, seed, split=split)]
        chunks = [asked[start : start + BATCH] for start in range(0, len(asked), BATCH)]
        return [
            loaded.answered(
                [one.images for one in chunk],
                [one.turns[0].prompt for one in chunk],
                [one.turns[0].answers[0] for one in chunk],
            )
            for chunk in chunks
        ]

    @cached_property
    def floats(self) -> list[tuple[Tensor, Tensor]]:
        """Of each question the float model's logits where its answer is predicted, and the answer."""
        return self.answers()

    @torch.no_grad()
    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """The same of the model as it is now."""
        found = []
        for batch in self.questions:
            logits = self.loaded.model(**{name: value for name, value in batch.items() if name != "labels"}).logits
            for sample, labels in enumerate(batch["labels"]):
                told = labels[1:] != -100
                found.append((logits[sample, :-1][told].float(), labels[1:][told]))
        return found

    def compared(self) -> dict[str, list[float]]:
        """How far the model as it is now is from its floats, question by question."""
        found: dict[str, list[float]] = {"kl": [], "same": [], "right": []}
        for (logits, answer), (exact, _) in zip(self.answers(), self.floats, strict=True):
            said = logits.argmax(-1)
            found["kl"].append(float(f"{float(divergence(logits, exact).clamp(min=0).mean()):.3g}"))
            found["same"].append(round(float((said == exact.argmax(-1)).float().mean()), 3))
            found["right"].append(float(bool((said == answer).all())))
        return found

    @contextmanager
    def remembering(self, part: Literal["decoder", "encoder"]) -> Iterator[None]:
        """The encoder runs once for each picture, where the method leaves it alone."""
        undo = stand_in(anatomy(self.loaded.model).vision, "forward", self._encode) if part == "decoder" else lambda: None
        try:
            yield
        finally:
            undo()

    def _encode(self, original: Callable[..., Any], pixels: Tensor, *args: Any, **kwargs: Any) -> Any:
        key = (*pixels.shape, hash(pixels.detach().numpy().tobytes()))
        if key not in self._remembered:
            self._remembered[key] = original(pixels, *args, **kwargs)
        return copy.copy(self._remembered[key])  # models write into it


class Kept:
    """Records in a file, a line each; what another process has written there meanwhile stays."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def content(self) -> dict[str, Any]:
        """All that is there."""
        return json.loads(self.path.read_text()) if self.path.is_file() else {"cells": {}, "speed": []}

    def add(self, key: str, record: dict[str, Any]) -> None:
        """One more cell."""
        content = self.content
        content["cells"][key] = record
        self.write(content)

    def write(self, content: Mapping[str, Any]) -> None:
        """Everything anew."""
        lines = [f"{json.dumps(key)}: {json.dumps(one)}" for key, one in content["cells"].items()]
        speed = [json.dumps(one) for one in content["speed"]]
        part = self.path.with_suffix(f".{os.getpid()}")
        cells, rounds, where = ",\n".join(lines), ",\n".join(speed), json.dumps(content.get("where", ""))
        part.write_text(f'{{"cells": {{\n{cells}\n}},\n"where": {where},\n"speed": [\n{rounds}\n]}}\n')
        part.replace(self.path)


def measure(cell: Cell, subject: Subject, artifacts: dict[str, foveate.Artifact]) -> dict[str, Any]:
    """The record of a cell."""
    if cell.keep is not None:
        return _together(cell, subject, artifacts)
    method = method_of(cell.method, cell.setting)
    assert method is not None
    with subject.remembering(method.part):
        floats = subject.floats
        samples = subject.samples(cell.seed) if method.streams else []
        began = time.process_time()
        artifact = foveate.quantize(subject.loaded.model, method, samples, seed=cell.seed)
        spent = time.process_time() - began
        with foveate.attach(subject.loaded.model, method, artifacts=[artifact]):
            found: dict[str, Any] = subject.compared()
    del floats
    return found | {"spent": round(spent, 1), "bits": _bits(artifact), "exact": _right(subject)}


def _together(cell: Cell, subject: Subject, artifacts: dict[str, foveate.Artifact]) -> dict[str, Any]:
    recipe: list[Any] = [] if cell.keep == 1 else [f"{PRUNED_BY}(keep={cell.keep})"]
    model, (subject_floats) = subject.loaded.model, subject.floats
    linears = [p for block in anatomy(model).layers for n, p in block.named_parameters() if p.ndim == 2]
    weights = 2 * sum(p.numel() for p in linears)  # as bfloat16
    method = None if cell.setting == "floats" else method_of(cell.method, cell.setting)
    if method is not None:
        if cell.setting not in artifacts:
            artifacts[cell.setting] = foveate.quantize(model, method, subject.samples(cell.seed), seed=cell.seed)
        weights = sum(value for name, value in artifacts[cell.setting].numbers["size"].items() if name != "weights")
        recipe.insert(0, method)
    with foveate.attach(model, recipe, artifacts=artifacts.values()) as session:
        found: dict[str, Any] = subject.compared()
        cache = sum(session.report.kv_bytes) / session.report.samples / 2  # as bfloat16
    del subject_floats
    return found | {"weights": weights, "cache": round(cache), "exact": _right(subject)}


def _bits(artifact: foveate.Artifact) -> float:
    size: Mapping[str, int] = artifact.numbers["size"]
    return round(8 * sum(count for name, count in size.items() if name != "weights") / size["weights"], 3)


def _right(subject: Subject) -> float:
    """The score of the floats."""
    right = [float(bool((logits.argmax(-1) == answer).all())) for logits, answer in subject.floats]
    return round(sum(right) / len(right), 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=120, help="begin nothing new after so many")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", choices=("cells", "together", "speed"), help="of the three parts")
    parser.add_argument("--rounds", type=int, default=9, help="of the times of whole models")
    parser.add_argument("--page", action="store_true", help="only write the page anew")
    arguments = parser.parse_args()
    kept, until = Kept(arguments.out), time.monotonic() + 60 * arguments.minutes
    models = arguments.models.split(",")
    wanted: list[Cell] = []
    if not arguments.page:
        both, every = list(together(models)), list(cells(models))
        quick = [cell for cell in every if cell.seed == 0 and cell.model in MODELS[:2] and cell.setting in TELLING[:3]]
        quick = [cell for cell in quick if cell.method.partition("(")[0] not in SLOW]
        wanted = {"cells": every, "together": both, "speed": []}.get(arguments.only, [*quick, *both, *every])
    subjects: dict[tuple[str, bool], Subject] = {}
    artifacts: dict[str, dict[str, foveate.Artifact]] = {}
    for cell in dict.fromkeys(wanted):
        if time.monotonic() > until:
            break
        if cell.key in kept.content["cells"]:
            continue
        subject = subjects.setdefault((cell.model, cell.sick), Subject(cell.model, cell.sick))
        began = time.monotonic()
        record = measure(cell, subject, artifacts.setdefault(cell.model, {}))
        kept.add(cell.key, record)
        mean = {name: sum(record[name]) / len(record[name]) for name in ("kl", "same", "right")}
        print(
            cell.key,
            {name: round(value, 4) for name, value in mean.items()},
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    if not arguments.page and arguments.only in (None, "speed"):
        time_models(kept, arguments.rounds, until)
    arguments.out.with_suffix(".md").write_text(page(kept.content, tuple(SETTINGS)))


def time_models(kept: Kept, rounds: int, until: float) -> None:
    """Rounds of all arms, until there are so many."""
    speed = Speed() if len(kept.content["speed"]) < rounds and time.monotonic() < until else None
    while speed is not None and len(kept.content["speed"]) < rounds and time.monotonic() < until:
        found = speed.round()
        kept.write((content := kept.content) | {"where": WHERE, "speed": [*content["speed"], found]})
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
