"""Shared by all tests."""

import os

# Nothing may be fetched from a hub at test time.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

# The bodies are tiny: more threads only wait for each other.
torch.set_num_threads(1)
