"""Drawn examples are the same on every run, and a busy machine is no failure."""

from hypothesis import settings

settings.register_profile("saccade", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("saccade")
