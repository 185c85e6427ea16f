"""One file for each published system, grouped by the place where its main idea acts."""

from saccade.methods.before_llm.hiprune import HiPrune
from saccade.methods.before_llm.random import Random
from saccade.methods.before_llm.scope import Scope
from saccade.methods.before_llm.uniform import Uniform
from saccade.methods.in_llm.fastv import FastV
from saccade.methods.in_llm.shortv import ShortV
from saccade.methods.kv_cache.snapkv import SnapKV

__all__ = ["FastV", "HiPrune", "Random", "Scope", "ShortV", "SnapKV", "Uniform"]
