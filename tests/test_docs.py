"""The code that some pages of the documentation show runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"


@pytest.mark.parametrize("page", ["pipeline.md", "production.md", "recipes.md"])
def test_the_code_of_a_page_runs(page: str) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks):
        exec(compile(code, f"{page}, block {number}", "exec"), names)
