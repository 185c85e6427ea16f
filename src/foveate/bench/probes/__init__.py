"""Probes: what a model does with its visual tokens, measured before a recipe is chosen.

`horizon` asks from which layer on they could go, `embedlens` how many of them say nothing about the picture. Each leaves
charts for the report and `Hints` for the tuner in the folder's ``probes.json``.
"""

from foveate.bench.probes.charts import Chart, Series, publish
from foveate.bench.probes.hints import Hints

__all__ = ["Chart", "Hints", "Series", "publish"]
