"""What is installed: the base that `attach` needs, extras for the rest, one small model, and no training."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from typing import Any

import pytest

from foveate.cli import NEEDS
from tests.test_imports import LARGER, MAY_IMPORT, PACKAGE, REPOSITORY, imported, rooms

BASE_FLOORS = ("core", "ops", "methods", "models", "engine")
OTHER_FLOORS = {*MAY_IMPORT} - {*BASE_FLOORS, LARGER}
OPTIONAL = {"av", "datasets", "rapidfuzz", "pyarrow", "lmms_eval", "optuna", "ray", "skimage", "sklearn"}
OPTIONAL |= {"fastapi", "h11", "prometheus_client", "uvicorn"}
"""Imported when they are asked for, with a line that names the extra."""
HOSTS = {"vllm", "prometheus_client"}
"""Imported only where they run us: vLLM, and what comes with it."""
NAMED = {"kvpress", "compressed_tensors"}
"""Whose parts a recipe may name, or whose format is to be written; imported then, and refused with what to install."""
COME_ALONG = {"tokenizers", "markupsafe"}
"""With transformers and Jinja, which are nothing without them."""
DISTRIBUTIONS = {"PIL": "pillow", "yaml": "pyyaml"}
"""Of modules that are not called like what is installed."""


def project(folder: str = ".") -> dict[str, Any]:
    return tomllib.loads((REPOSITORY / folder / "pyproject.toml").read_text())


def names(requirements: list[str]) -> set[str]:
    """What is required, without versions and this package itself."""
    return {re.match(r"[\w-]+", each)[0] for each in requirements} - {"foveate"}  # type: ignore[index]


BASE = names(project()["project"]["dependencies"])


def foreign(module: str) -> set[str]:
    """The packages of others that a module imports."""
    return {name.partition(".")[0] for name in imported(module)} - sys.stdlib_module_names - {"foveate"}


def distributions(packages: set[str]) -> set[str]:
    return {DISTRIBUTIONS.get(name, name) for name in packages}


@pytest.mark.parametrize("module", rooms(*BASE_FLOORS))
def test_a_recipe_runs_on_the_base_alone(module: str) -> None:
    assert distributions(foreign(module)) - NAMED <= BASE


BASE_ALONE = """
import sys
sys.modules.update(dict.fromkeys(("PIL", "matplotlib")))
import foveate, torch
from transformers import AutoModelForImageTextToText
model = AutoModelForImageTextToText.from_pretrained(foveate.reference.path())
ids = torch.tensor([[4, *[model.config.image_token_id] * 144, 10, 5]])
inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.zeros(1, 3, 96, 96)}
with foveate.attach(model, "hiprune(keep=64) + mixkv(keep=0.2)") as session:
    model.generate(**inputs, max_new_tokens=2)
print(session.report.visual_tokens)
foveate.reference.load()
"""


def test_without_extras_models_run_and_pictures_are_refused_by_name() -> None:
    done = subprocess.run([sys.executable, "-c", BASE_ALONE], capture_output=True, text=True)

    assert "64" in done.stdout
    assert "Missing optional dependencies" in done.stderr.splitlines()[-1]
    assert "Pillow" in done.stderr.splitlines()[-1]


def test_the_command_line_knows_what_it_needs() -> None:
    found = set.union(*(foreign(module) for module in rooms(*OTHER_FLOORS))) - OPTIONAL - HOSTS - COME_ALONG
    extras = project()["project"]["optional-dependencies"]

    assert distributions(found) - BASE == distributions(set(NEEDS))
    assert names(extras["cli"] + extras["report"]) == distributions(set(NEEDS))


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    assert project()["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["src/foveate"]}


def test_the_package_holds_one_small_model_and_no_training() -> None:
    models = {path.parent.name for path in PACKAGE.rglob("model.safetensors")}
    training = [path.name for path in (PACKAGE / "reference").glob("*.py") if ".backward(" in path.read_text()]

    assert models == {"checkpoint", "text_tower"}
    assert training == []
    assert sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.suffix != ".pyc") < 25e6


def test_the_package_of_the_larger_models_holds_them_and_all_training() -> None:
    folder = REPOSITORY / "packages" / "foveate-reference"
    wheel = project(str(folder))["tool"]["hatch"]["build"]["targets"]["wheel"]

    assert wheel == {"packages": [f"src/{LARGER}"]}
    assert {path.parent.name for path in folder.rglob("model.safetensors")} == {"tiles", "qwen"}
