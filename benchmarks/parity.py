"""vLLM's plug-in against `foveate.attach`: the same weights, pictures and questions, in float32.

    make parity                                           # in the environment of `make test-serving`
    python -m benchmarks.parity --models reference --n 500

Every method that a server runs, on every shipped checkpoint. Writes <out>.json, where records of other models stay, and
<out>.md.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import vllm
from tests.serving.vllm.both import Answer, ask, attached, change, engine, stop, watch

import foveate
from foveate import reference
from foveate.models.processors import read_processor
from foveate.serving.vllm.admission import fitting
from foveate.serving.vllm.families import FAMILIES
from foveate.tasks import SPINE, questions

WITHOUT_CLS = {"scope": "saliency='received'", "score": "salience='received'"}
"""What methods that read CLS read where there is none."""


LARGER = ("document", "chart", "screen", "dense", "needle", "relation")
"""Tasks of pictures that are larger than a tile; smaller ones are shown twice by models that cut tiles, and nearly alike."""


def main() -> None:
    args = _arguments()
    records = []
    for name in args.models:
        folder = reference.path(name)
        tasks = SPINE if name == "reference" else LARGER
        asked = [each for task in tasks for each in questions(task, -(-args.n // len(tasks)), seed=21)][: args.n]
        processor = read_processor(folder)
        llm = engine(folder, f"uniform(keep={args.keep})", max_model_len=2048)
        family = FAMILIES[llm.llm_engine.model_config.hf_config.model_type]
        for recipe in _recipes(family, llm.llm_engine.model_config.hf_config, args.keep):
            begun = time.time()
            theirs = attached(folder, recipe, asked)
            change(llm, recipe)
            kept = watch(llm)
            ours = ask(llm, processor, asked)
            assert len(kept) == len(asked), f"{len(kept)} pictures were encoded for {len(asked)} questions"
            record = {"model": name, "recipe": recipe, **_compared(ours, theirs, kept)}
            if record["score_gaps"]:
                record["float64_equal"] = _of_rounding(folder, recipe, asked, theirs)
            records.append(record)
            print(f"{time.time() - begun:.0f} s", records[-1], flush=True)
        stop(llm)
    run = {
        "command": "python -m benchmarks.parity",
        "foveate": foveate.__version__,
        "vllm": vllm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
    }
    out = Path(args.out)
    earlier = json.loads(out.with_suffix(".json").read_text())["records"] if out.with_suffix(".json").is_file() else []
    records = sorted(
        [one for one in earlier if one["model"] not in args.models] + records,
        key=lambda one: reference.MODELS.index(one["model"]),
    )
    out.with_suffix(".json").write_text(json.dumps({"run": run, "records": records}, indent=1) + "\n")
    out.with_suffix(".md").write_text(_markdown(run, records))


def _recipes(family: Any, config: Any, keep: float) -> list[str]:
    traits = family.traits(config)
    fit = fitting(traits, family.built(config))
    more = {} if traits.has_cls else WITHOUT_CLS
    return [f"{name}(keep={keep}, {more[name]})" if name in more else f"{name}(keep={keep})" for name in [*fit, *more]]


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
    exact = attached(folder, recipe, asked, "float64")
    return sum(one.kept == other.kept for one, other in zip(theirs, exact))


def _score_gap(answer: Answer, kept: list[list[int]]) -> float | None:
    """By how much the scores of the tokens differ that one side keeps and the other does not; None if none were ranked."""
    gaps = []
    for step in answer.steps:
        for scores in step.scores:
            for view, (mine, theirs) in enumerate(zip(kept, answer.kept)):
                other = set(mine) ^ set(theirs)
                here = (step.before.item[0] == view) & torch.tensor([int(o) in other for o in step.before.ordinal[0]])
                found = scores[0][here & ~scores[0].isnan()]
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
        "token that is pushed two ways by a hundredth, which leaves float32 some three digits.)",
        "",
        "| model | recipe | kept | score gap | float64 | answers | log-probability |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in records:
        gaps = [gap for gap in one["score_gaps"] if gap is not None]
        gap = f"{max(gaps):.1e}" if gaps else "–"
        of = one["questions"]
        exact = f"{one['float64_equal']} of {of}" if "float64_equal" in one else "–"
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
    parser.add_argument("--out", default="docs/parity")
    return parser.parse_args()


if __name__ == "__main__":
    main()
