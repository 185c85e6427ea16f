"""A file of generated questions, and the command on it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from tests.serving.batch.conftest import lines

from foveate import tasks

FOVEATE = [sys.executable, "-c", "from foveate.cli import main; main()"]


def questions(folder: Path, n: int) -> tuple[Path, dict[str, str]]:
    """A file of generated questions with their pictures, and the right answers.

    The picture of the first one is none, that of the second is not there, and the third is a conversation.
    """
    rows, right = [], {}
    for number, asked in enumerate(tasks.questions("attribute", n, seed=0)):
        asked.image.save(folder / f"{number}.png")
        rows.append({"id": f"a{number}", "image": f"{number}.png", "question": asked.prompt})
        right[f"a{number}"] = asked.answer
    (folder / "0.png").write_bytes(b"no picture")
    rows[1]["image"] = "nowhere.png"
    rows[2]["question"] = [rows[2]["question"]] * 2
    path = folder / "in.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path, right


def check(out: Path, right: dict[str, str], tokens: tuple[int, int]) -> None:
    """What stands in the file of answers is one line for each of `questions`."""
    found = {line["id"]: line for line in lines(out)}
    assert len(lines(out)) == len(found) == len(right)
    assert found["a0"]["error"].endswith("0.png': is not a picture that can be read")
    assert found["a1"]["error"].endswith("nowhere.png': no such file")
    assert found["a2"]["answer"][0] == right["a2"]
    answered = [found[f"a{number}"] for number in range(3, len(right))]
    assert {(line["tokens_before"], line["tokens_after"]) for line in answered} == {tokens}
    assert sum(line["answer"] == right[line["id"]] for line in answered) >= 0.9 * len(answered)


def ask_server(url: str, folder: Path, *options: Any) -> None:
    """`foveate batch` on a server of the reference model that keeps 36 tokens, by itself, and asked for 64."""
    data, right = questions(folder, 16)
    for tokens, more in ((36, []), (64, ["--keep", "64"])):
        out = folder / f"{tokens}.jsonl"
        command = [*FOVEATE, "batch", str(data), str(out), "--server", url, "--max-new-tokens", "4", *options, *more]
        done = subprocess.run(command, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (1, f"{out}: 14 answers, and 2 that say what failed\n"), done.stderr
        check(out, right, (144, tokens))
