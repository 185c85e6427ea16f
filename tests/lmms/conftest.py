"""Tasks of lmms-eval about generated scenes, as files on this machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from foveate.tasks import Question, questions

CODE = '''
from PIL import Image

from foveate.tasks.metrics import exact


def pictures(doc):
    return [Image.open(path) for path in doc["pictures"]]


def score(doc, results):
    return {"exact": exact(results[0], doc["answers"])}


def turn(doc, lmms_eval_specific_kwargs=None, round_idx=None, previous_output=None, previous_round_info=None):
    """The same question three times, the last with what was said so far."""
    if round_idx is None:
        return doc["prompt"]
    if round_idx == 3:
        return None, None, True, previous_output, None
    heard = [*(previous_round_info or []), previous_output[-1]]
    assert heard == previous_output
    prompt = doc["prompt"] if round_idx < 2 else doc["prompt"] + " " + " ".join(heard)
    return pictures(doc), prompt, False, previous_output, heard


def score_rounds(doc, results):
    rounds, = results
    return {"exact": exact(rounds[1], doc["answers"]), "rounds": float(len(rounds))}
'''

TASK = """
dataset_path: json
dataset_kwargs: {{cache_dir: {folder}/cache, data_files: {{test: {folder}/questions.jsonl}}}}
test_split: test
doc_to_visual: !function scenes.pictures
doc_to_target: answers
generation_kwargs: {{max_new_tokens: 16, temperature: 0, until: ["\\n"]}}
metadata: {{version: 1}}
"""

ONE_TURN = """
task: scenes
output_type: generate_until
doc_to_text: prompt
process_results: !function scenes.score
metric_list: [{metric: exact, aggregation: mean, higher_is_better: true}]
"""

ROUNDS = """
task: scenes_rounds
output_type: generate_until_multi_round
doc_to_text: !function scenes.turn
process_results: !function scenes.score_rounds
metric_list:
  - {metric: exact, aggregation: mean, higher_is_better: true}
  - {metric: rounds, aggregation: mean, higher_is_better: true}
"""


@pytest.fixture(scope="session")
def asked() -> list[Question]:
    """Ten questions, some of which need what pruning drops."""
    return questions("position", 10, seed=0)


@pytest.fixture(scope="session")
def task_folder(asked: Sequence[Question], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for ``--include_path`` with the tasks ``scenes`` and ``scenes_rounds``."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = []
    for number, question in enumerate(asked):
        path = folder / f"{number}.png"
        question.image.save(path)
        (turn,) = question.turns
        lines.append(json.dumps({"pictures": [str(path)], "prompt": turn.prompt, "answers": turn.answers}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    (folder / "scenes.py").write_text(CODE)
    for name, own in (("scenes", ONE_TURN), ("scenes_rounds", ROUNDS)):
        (folder / f"{name}.yaml").write_text(own + TASK.format(folder=folder))
    return folder
