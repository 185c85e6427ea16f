"""vLLM's plug-in against `foveate.attach`: the same weights, pictures and questions, in float32.

    make parity                                           # in the environment of `make test-serving`
    python -m benchmarks.parity --models reference --n 500 --minutes 20

Every method that a server runs, on every shipped checkpoint; some questions under each, then the next ones, so that a run
that ends early has asked about as many of all. Writes <out>.json after every part, goes on with what is there, and writes
<out>.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from tests.serving.vllm.both import Answer, ask, attached, change, engine, stop, watch

import foveate
from foveate import reference
from foveate.core.files import write_whole
from foveate.models.processors import read_processor
from foveate.serving.vllm.admission import fitting
from foveate.serving.vllm.families import FAMILIES
from foveate.tasks import SPINE, questions

WITHOUT_CLS = {"scope": "saliency='received'", "score": "salience='received'"}
"""What methods that read CLS read where there is none."""


LARGER = ("document", "chart", "screen", "dense", "needle", "relation")
"""Tasks of pictures that are larger than a tile; smaller ones are shown twice by models that cut tiles, and nearly alike."""


AT_A_TIME, BATCH = 50, 10
"""Questions of a part, and of a batch of transformers'."""


def main() -> None:
    args = _arguments()
    out, until = Path(args.out), time.monotonic() + 60 * args.minutes
    kept = Kept(out.with_suffix(".json"), args.again)
    for place, name in enumerate(args.models):
        now = time.monotonic()  # what time there is is shared among the models to come
        measure(name, args.n, args.keep, args.methods, kept, now + (until - now) / (len(args.models) - place))
        explain(name, kept, until)
    out.with_suffix(".md").write_text(_markdown(kept.run, kept.records))


class Kept:
    """What was measured so far, in a file."""

    def __init__(self, path: Path, again: bool) -> None:
        self.path = path
        there = path.is_file() and not again
        self.records: list[dict[str, Any]] = json.loads(path.read_text())["records"] if there else []
        self.run = {
            "command": "python -m benchmarks.parity",
            "foveate": foveate.__version__,
            "vllm": vllm.__version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        }

    def of(self, model: str, recipe: str) -> dict[str, Any] | None:
        """The record of a recipe on a model."""
        return next((one for one in self.records if (one["model"], one["recipe"]) == (model, recipe)), None)

    def add(self, record: dict[str, Any]) -> None:
        """A part more of a recipe's record, or the first one."""
        before = self.of(record["model"], record["recipe"])
        if before is None:
            self.records.append(record)
            self.records.sort(key=lambda one: reference.MODELS.index(one["model"]))
        else:
            gap = max(before["logprob_gap"], record["logprob_gap"])
            counts = {name: before.get(name, 0) + value for name, value in record.items() if isinstance(value, int)}
            before |= counts | {"logprob_gap": gap, "score_gaps": before["score_gaps"] + record["score_gaps"]}
        self.write()

    def write(self) -> None:
        """All of it."""
        write_whole(self.path, (json.dumps({"run": self.run, "records": self.records}, indent=1) + "\n").encode())


def asked_of(name: str, n: int) -> list[Any]:
    """The first ``n`` questions to a model, of all tasks in turn."""
    tasks = SPINE if name == "reference" else LARGER
    return list(chain.from_iterable(zip(*(questions(task, -(-n // len(tasks)), seed=21) for task in tasks))))[:n]


def measure(name: str, n: int, keep: float, only: Sequence[str], kept: Kept, until: float) -> None:
    """A model's questions that are not there yet, to ``n`` under each recipe (``only`` of some methods, if any)."""
    if time.monotonic() > until:
        return
    folder, asked = reference.path(name), asked_of(name, n)
    processor = read_processor(folder)
    llm = engine(folder, f"uniform(keep={keep})", max_model_len=2048)
    config = llm.llm_engine.model_config.hf_config
    recipes = _recipes(FAMILIES[config.model_type], config, keep)
    recipes = [recipe for recipe in recipes if not only or recipe.partition("(")[0] in only]
    for start, recipe in product(range(0, n, AT_A_TIME), recipes):
        before = kept.of(name, recipe)
        begun, part = time.time(), asked[max(start, before["questions"] if before else 0) : start + AT_A_TIME]
        if not part:
            continue
        if time.monotonic() > until:
            break
        theirs = attached(folder, recipe, part, at_once=BATCH)
        change(llm, recipe)
        chosen = watch(llm)
        ours = ask(llm, processor, part)
        assert len(chosen) == len(part), f"{len(chosen)} pictures were encoded for {len(part)} questions"
        record = {"model": name, "recipe": recipe, **_compared(ours, theirs, chosen)}
        if record["score_gaps"] or (before is not None and before["score_gaps"]):
            record |= {"float64_equal": _of_rounding(folder, recipe, part, theirs), "float64_of": len(part)}
        kept.add(record)
        print(f"{time.time() - begun:.0f} s", start, record, flush=True)
    stop(llm)


def explain(name: str, kept: Kept, until: float) -> None:
    """What is left to rounding, where kept tokens differ and it is not known."""
    for record in kept.records:
        if record["model"] == name and record["score_gaps"] and "float64_of" not in record and time.monotonic() < until:
            folder, asked = reference.path(name), asked_of(name, record["questions"])
            theirs = attached(folder, record["recipe"], asked, at_once=BATCH)
            equal = _of_rounding(folder, record["recipe"], asked, theirs)
            record |= {"float64_equal": equal, "float64_of": len(asked)}
            kept.write()


def _recipes(family: Any, config: Any, keep: float) -> list[str]:
    traits = family.traits(config)
    fit = fitting(traits, family.built(config))
    more = {} if traits.has_cls else WITHOUT_CLS
    made = [f"{name}(keep={keep}, {more[name]})" if name in more else f"{name}(keep={keep})" for name in [*fit, *more]]
    return [*made, f"zoo_prune(keep={keep}, h=1.0)"]


def _compared(ours: Sequence[Answer], theirs: Sequence[Answer], kept: Sequence[list[list[int]]]) -> dict[str, Any]:
    equal = [one.ids == other.ids for one, other in zip(ours, theirs)]
    other_sets = [number for number, (mine, answer) in enumerate(zip(kept, theirs)) if mine != answer.kept]
    gaps = [
        abs(a - b) for one, other, same in zip(ours, theirs, equal) if same for a, b in zip(one.logprobs, other.logprobs)
    ]
    return {
        "questions": len(ours),
        "answers_equal": sum(equal),
        "kept_equal": len(ours) - len(other_sets),
        "score_gaps": [_score_gap(theirs[number], kept[number]) for number in other_sets],
        "logprob_gap": max(gaps, default=0.0),
    }


def _of_rounding(folder: Path, recipe: str, asked: Sequence[Any], theirs: Sequence[Answer]) -> int:
    """Pictures of which transformers keeps the same in float32 and in float64."""
    exact = attached(folder, recipe, asked, "float64", at_once=BATCH)
    return sum(one.kept == other.kept for one, other in zip(theirs, exact))


def _score_gap(answer: Answer, kept: list[list[int]]) -> float | None:
    """By how much the scores of the tokens differ that one side keeps and the other does not; None if none were ranked."""
    gaps, row = [], answer.row
    for step in answer.steps:
        for scores in step.scores:
            for view, (mine, theirs) in enumerate(zip(kept, answer.kept)):
                other = set(mine) ^ set(theirs)
                here = (step.before.item[row] == view) & torch.tensor([int(o) in other for o in step.before.ordinal[row]])
                found = scores[row][here & ~scores[row].isnan()]
                gaps += [float(found.max() - found.min())] if len(found) else []
    return max(gaps, default=None)


def _markdown(run: dict[str, Any], records: Sequence[dict[str, Any]]) -> str:
    lines = [
        "# Parity of vLLM and transformers",
        "",
        f"Written by `{run['command']}` (vLLM {run['vllm']}, transformers {run['transformers']}, torch {run['torch']}).",
        "",
        "The same weights, pictures and questions (of the test split, of six tasks that the model was taught), in float32",
        "on a CPU: under vLLM's plug-in, and under `foveate.attach`. *Kept* are the pictures of which both keep the same",
        "tokens (of each view); where they differ, the score gap is the largest difference between the scores of tokens",
        "that only one of them keeps. *Answers* are equal to the last token; of those, the largest difference of a token's",
        "log-probability. Where kept tokens differ, *float64* are the pictures of which transformers itself keeps the",
        "same in float32 and in float64: what is left to rounding. (`zoo_prune` compares what the projector makes of a",
        "token that is pushed two ways by `h`, a hundredth. On reference-qwen what is pushed is of a length of 800, so this",
        "leaves float32 three digits; with `h=1` there are two more.)",
        "",
        "| model | recipe | kept | score gap | float64 | answers | log-probability |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in records:
        gaps = [gap for gap in one["score_gaps"] if gap is not None]
        gap = f"{max(gaps):.1e}" if gaps else "–"
        of = one["questions"]
        exact = f"{one['float64_equal']} of {one['float64_of']}" if "float64_of" in one else "–"
        lines.append(
            f"| {one['model']} | `{one['recipe']}` | {one['kept_equal']} of {of} | {gap} | {exact} "
            f"| {one['answers_equal']} of {of} | {one['logprob_gap']:.1e} |"
        )
    return "\n".join(lines) + "\n"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=500, help="questions for each model and recipe")
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--models", nargs="+", default=list(reference.MODELS), choices=reference.MODELS)
    parser.add_argument("--methods", nargs="+", default=(), help="only these")
    parser.add_argument("--minutes", type=float, default=240, help="begin no part after so many")
    parser.add_argument("--again", action="store_true", help="forget what is there")
    parser.add_argument("--out", default="docs/parity")
    return parser.parse_args()


if __name__ == "__main__":
    main()
