"""Anatomy of each model family: where its parts are. Data and small functions, no copied forwards."""

from foveate.models.anatomy import Anatomy, anatomy

__all__ = ["Anatomy", "anatomy"]
