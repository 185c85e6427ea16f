"""What vLLM without a recipe makes of some questions, as JSON: for a process of its own, with or without the plug-in.

VLLM_PLUGINS= python -m tests.serving.vllm.plain OUT.json
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from foveate import reference
from foveate.models.processors import read_processor
from foveate.tasks import SPINE, questions
from tests.serving.vllm.both import ask, engine, stop


def made(name: str) -> dict[str, Any]:
    """Of a reference model: whose classes run, and answers with their log-probabilities, to one picture and to two."""
    folder = reference.path(name)
    llm, processor = engine(folder, None), read_processor(folder)
    asked = [each for task in SPINE for each in questions(task, 2, seed=5)]
    asked += [replace(one, images=one.images + other.images) for one, other in zip(asked[::4], asked[1::4])]
    answers = ask(llm, processor, asked)
    again = ask(llm, processor, asked[:4])  # out of the caches
    (model,) = llm.apply_model(lambda model: type(model).__module__)
    theirs = type(llm.llm_engine.renderer.get_mm_processor()).__module__
    stop(llm)
    return {
        "classes": [model, theirs],
        "answers": [[each.ids, each.logprobs, each.cached] for each in [*answers, *again]],
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps({name: made(name) for name in ("reference", "reference-qwen")}))
