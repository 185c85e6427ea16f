"""A command line to call, and a checkpoint small enough to call it on."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests import clip
from typer.testing import CliRunner, Result

from foveate.cli.app import app
from foveate.reference.model import Dimensions, build_model, build_processor, build_text_tower

TINY = Dimensions(
    head_width=16,
    vision_width=32,
    vision_layers=3,
    decoder_width=32,
    decoder_layers=3,
    decoder_mlp=64,
    text_layers=1,
    projection=16,
)

Call = Callable[..., Result]


@pytest.fixture
def call() -> Call:
    """Runs ``foveate`` with arguments."""
    return lambda *arguments: CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA checkpoint with random weights, shaped and worded like the reference model."""
    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    build_model(TINY).save_pretrained(folder)
    build_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP checkpoint whose vision tower is as wide as the one of ``tiny``."""
    folder = tmp_path_factory.mktemp("clip")
    clip.clip(TINY.vision_width).save_pretrained(folder)
    clip.text_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def with_text_tower(tiny: Path, tmp_path: Path) -> Path:
    """``tiny`` with a text tower in its folder."""
    own = shutil.copytree(tiny, tmp_path / "with_text_tower")
    torch.manual_seed(0)
    build_text_tower(TINY).save(own / "text_tower")
    return own


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    path = tmp_path / "picture.png"
    Image.linear_gradient("L").save(path)
    return path
