"""The code that docs/production.md shows runs, one block after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "production.md"


def test_the_code_of_the_page_on_production_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert blocks
    names: dict[str, Any] = {}
    for number, code in enumerate(blocks):
        exec(compile(code, f"{PAGE.name}, block {number}", "exec"), names)
