"""The code that docs/production.md shows runs, one block after the other; what commands write is current."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "production.md"


def test_the_code_of_the_page_on_production_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks):
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)


def test_the_list_of_methods_in_the_readme_is_what_they_say_of_themselves() -> None:
    written = (ROOT / "README.md").read_text()
    command = runpy.run_path(str(ROOT / "benchmarks" / "methods.py"))

    assert command["current"](written) == written, "README.md is behind its methods; run: python benchmarks/methods.py"
