"""A server without a recipe is vLLM's own, to the last bit, whether the plug-in is installed or not.

Four engines more, in two processes: `make test-serving SLOW=1`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def run(plugins: str, out: Path) -> dict[str, Any]:
    """What `tests.serving.vllm.plain` makes of it."""
    command = [sys.executable, "-m", "tests.serving.vllm.plain", str(out)]
    done = subprocess.run(command, env=os.environ | {"VLLM_PLUGINS": plugins}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.slow
def test_it_is_as_without_the_plug_in(tmp_path):
    without, having = run("", tmp_path / "without.json"), run("foveate", tmp_path / "with.json")
    for name, theirs in without.items():
        assert having[name]["answers"] == theirs["answers"]
        assert all(module.startswith("vllm.") for module in theirs["classes"])
        assert all(module.startswith("foveate.serving.vllm.") for module in having[name]["classes"])
