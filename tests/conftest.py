"""Shared by all tests."""

import gc
import os

# Nothing may be fetched from a hub at test time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from hypothesis import settings

# The bodies are tiny: more threads only wait for each other.
torch.set_num_threads(1)

# Drawn examples are the same on every run, and a busy machine is no failure.
settings.register_profile("foveate", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("foveate")


def pytest_collection_finish() -> None:
    """What was collected stays to the end: no collection of garbage, of which memory tests ask for many, walks it again."""
    gc.collect()
    gc.freeze()
