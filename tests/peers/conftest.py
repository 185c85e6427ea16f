"""Sorts what happens under a recipe: as without it, refused by design, or a fault."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foveate.core.errors import FoveateError
from tests.peers.archive import FOLDER

collect_ignore = [] if FOLDER.exists() and importlib.util.find_spec("parameterized") else ["test_peers.py"]

REFUSALS: list[dict[str, str]] = tomllib.loads((Path(__file__).parent / "refusals.toml").read_text())["refusal"]
_MARKS = ("accelerate_tests", "flash_attn_test", "flash_attn_3_test", "flash_attn_4_test", "torch_compile_test", "order")
"""What transformers marks its tests with."""
_FAILS, _IDLE = "fails without a recipe", "calls no outermost model"
_PLAIN = pytest.StashKey[dict[tuple[str, str], str]]()
"""Why a family's test says nothing under a recipe."""
_MET = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--family", help="only this model family")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_PLAIN], config.stash[_MET] = {}, Counter()
    for mark in _MARKS:
        config.addinivalue_line("markers", f"{mark}: one of transformers' own")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    family = config.getoption("family", None)  # no option where this folder is not named
    if family:
        items[:] = [item for item in items if getattr(getattr(item, "cls", None), "family", family) == family]


def pytest_runtest_setup(item: pytest.Item) -> None:
    if getattr(getattr(item, "cls", None), "recipe", "plain") != "plain":
        reason = item.config.stash[_PLAIN].get((item.cls.family, item.name))
        if reason:
            pytest.skip(reason)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[Any]:
    report: pytest.TestReport = yield
    recipe = getattr(getattr(item, "cls", None), "recipe", None)
    if recipe is None or call.when != "call":
        return report
    if recipe == "plain":
        known, key = item.config.stash[_PLAIN], (item.cls.family, item.name)
        attached = getattr(item._instance, "attached", None)  # a test that is skipped is never set up
        if report.failed:  # a subtest of it, perhaps
            known[key] = report.wasxfail = _FAILS
            report.outcome = "skipped"
        elif attached is None or not attached.calls:
            known.setdefault(key, _IDLE)
        elif known.get(key) == _IDLE:
            del known[key]
    elif report.failed:
        reason = _refusal(call.excinfo.value)
        if reason is not None:
            item.config.stash[_MET][reason] += 1
            report.outcome, report.wasxfail = "skipped", reason
    return report


def _refusal(error: BaseException | None) -> str | None:
    """Why the error is a refusal by design, or None."""
    while error is not None and not isinstance(error, FoveateError):
        error = error.__cause__ or error.__context__
    if error is None:
        return None
    return next((known["reason"] for known in REFUSALS if re.search(known["message"], str(error))), None)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    fails = Counter(name for (_, name), why in config.stash[_PLAIN].items() if why == _FAILS)
    for title, met in (("fails without a recipe, in so many families", fails), ("refused by design", config.stash[_MET])):
        if met:
            terminalreporter.section(title)
            for name, count in met.most_common():
                terminalreporter.write_line(f"{count:5}  {name}")
