"""Runs lmms-eval on tasks of this machine; `make test-lmms` has an environment for it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.api.instance import Instance
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import get_model
from lmms_eval.tasks import TaskManager

from foveate import checkpoint
from foveate.bench.cells import Cell
from foveate.bench.encodings import Encodings
from foveate.bench.folder import Settings
from foveate.bench.lmms.model import Foveate
from foveate.bench.measure import measure
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.tasks import Question

BATCH = 4
Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def evaluate(task_folder: Path) -> Evaluate:
    """Runs a task under a recipe; the samples are in the order of the questions."""
    manager = TaskManager("ERROR", include_path=str(task_folder), include_defaults=False, model_name="foveate")

    def run(task: str, recipe: str) -> dict[str, Any]:
        arguments = f"pretrained=reference,device=cpu,recipe={recipe}"
        return simple_evaluate("foveate", arguments, tasks=[task], task_manager=manager, batch_size=BATCH, verbosity="ERROR")

    return run


def answers(results: dict[str, Any], task: str) -> list[Any]:
    return [sample["filtered_resps"][0] for sample in sorted(results["samples"][task], key=lambda each: each["doc_id"])]


def request(message: dict[str, Any], **generation: Any) -> Instance:
    arguments = ("", lambda doc, **_: [message], generation, 0, "own", "test")
    return Instance("generate_until", arguments, 0, {"task": "own", "doc_id": 0, "repeats": 1})


def test_lmms_eval_finds_the_model() -> None:
    assert get_model("foveate") is Foveate


@pytest.mark.parametrize(
    "recipe", ["none", "hiprune(alpha=0.2, keep=0.22)", "random(keep=0.25)", "snapkv(window=8, keep=0.1)"]
)
def test_answers_are_those_of_the_bench(recipe: str, evaluate: Evaluate, asked: Sequence[Question]) -> None:
    settings = Settings("reference", len(asked), 0, "cpu", "float32", BATCH)
    loaded = checkpoint.load("reference", "cpu", "float32")
    cell = Cell("position", recipe, None, Recipe.parse(recipe))
    bench = measure(loaded, Encodings(loaded.model), settings, cell, asked, lambda _: None)

    results = evaluate("scenes", recipe)

    assert answers(results, "scenes") == [answer.prediction for answer in bench.answers]
    assert results["results"]["scenes"]["exact,none"] == pytest.approx(fmean(answer.score for answer in bench.answers))
    assert results["throughput"]["avg_visual_tokens_last_layer"] == pytest.approx(bench.visual_tokens)
    assert results["throughput"]["avg_kv_mib"] == pytest.approx(bench.kv_bytes / 2**20)


def test_every_round_hears_the_answers_before_it(evaluate: Evaluate) -> None:
    results = evaluate("scenes_rounds", "hiprune(keep=0.33)")

    said = answers(results, "scenes_rounds")
    assert results["results"]["scenes_rounds"]["rounds,none"] == 3
    assert [first for first, _, _ in said] == [second for _, second, _ in said]


def test_several_pictures_and_none_in_one_batch(asked: Sequence[Question]) -> None:
    first, second, third = asked[:3]
    messages = [
        {
            "role": "user",
            "content": [*({"type": "image", "url": each.image} for each in shown), {"type": "text", "text": first.prompt}],
        }
        for shown in ((), (first,), (second, third))
    ]
    model = Foveate(recipe="hiprune(keep=32)", device="cpu", batch_size=3)
    model.task_dict = {"own": {"test": [None]}}

    together = model.generate_until([request(message, max_new_tokens=8) for message in messages])
    figures = model._cost.figures()

    alone = [model.generate_until([request(message, max_new_tokens=8)])[0] for message in messages]
    assert [each.text for each in together] == [each.text for each in alone]
    assert figures["visual_tokens_unmodified"] == pytest.approx((0 + 144 + 288) / 3)
    assert figures["visual_tokens"] == pytest.approx((0 + 32 + 64) / 3)


def test_requests_with_other_settings_are_answered_apart(asked: Sequence[Question]) -> None:
    content = [{"type": "image", "url": asked[0].image}, {"type": "text", "text": "what color is the star?"}]
    model = Foveate(device="cpu", batch_size=4)
    model.task_dict = {"own": {"test": [None]}}
    message = {"role": "user", "content": content}

    whole, cut, again = model.generate_until([request(message), request(message, until=["e"]), request(message)])

    assert whole.text == again.text
    assert cut.text == whole.text.partition("e")[0].strip()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("recipe=fastv(layer=99)", "layer=99"),
        ("recipe=hiprune(keep=64", "write it like"),
        ("keep=64", "model_args='keep=64'"),
        ("batch_size=auto", "batch_size='auto': must be a whole number"),
    ],
)
def test_mistakes_are_told_in_a_line(arguments: str, message: str) -> None:
    with pytest.raises(FoveateError) as caught:
        Foveate.create_from_arg_string(f"device=cpu,{arguments}", {"batch_size": 1})

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_loglikelihood_is_refused() -> None:
    with pytest.raises(FoveateError, match="generate_until variant"):
        Foveate(device="cpu").loglikelihood([])


def test_the_command_line_keeps_scores_and_cost_in_one_file(task_folder: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "best.yaml"
    recipe.write_text("- hiprune: {keep: 48}\n")
    command = [sys.executable, "-m", "lmms_eval", "--model", "foveate", "--tasks", "scenes", "--batch_size", "4"]
    command += ["--model_args", f"pretrained=reference,device=cpu,recipe={recipe}"]
    command += ["--include_path", str(task_folder), "--output_path", str(tmp_path / "out")]

    subprocess.run(command, check=True, capture_output=True)

    (path,) = (tmp_path / "out" / "reference").glob("*_results.json")
    results = json.loads(path.read_text())
    assert 0 <= results["results"]["scenes"]["exact,none"] <= 1
    assert results["throughput"]["avg_visual_tokens"] == pytest.approx(48)
    assert results["throughput"]["avg_visual_tokens_unmodified"] == pytest.approx(144)
