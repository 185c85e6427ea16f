"""One file for each published system, grouped by the place where its main idea acts."""

from saccade.methods.before_encoder.index_preserving import IndexPreserving
from saccade.methods.before_llm.cdpruner import CDPruner
from saccade.methods.before_llm.hiprune import HiPrune
from saccade.methods.before_llm.ppe import PPE
from saccade.methods.before_llm.prumerge import PruMerge
from saccade.methods.before_llm.random import Random
from saccade.methods.before_llm.scope import Scope
from saccade.methods.before_llm.uniform import Uniform
from saccade.methods.in_encoder.folder import Folder
from saccade.methods.in_encoder.tome import ToMe
from saccade.methods.in_llm.alvts import ALVTS
from saccade.methods.in_llm.fastv import FastV
from saccade.methods.in_llm.feather import Feather
from saccade.methods.in_llm.hidrop import HiDrop
from saccade.methods.in_llm.ivc_prune import IVCPrune
from saccade.methods.in_llm.shortv import ShortV
from saccade.methods.in_llm.transprune import TransPrune
from saccade.methods.in_llm.v2drop import V2Drop
from saccade.methods.kv_cache.mixkv import MixKV
from saccade.methods.kv_cache.prefixkv import PrefixKV
from saccade.methods.kv_cache.snapkv import SnapKV
from saccade.methods.kv_cache.sparsevila import SparseVILA

__all__ = [
    "ALVTS",
    "PPE",
    "CDPruner",
    "FastV",
    "Feather",
    "Folder",
    "HiDrop",
    "HiPrune",
    "IVCPrune",
    "IndexPreserving",
    "MixKV",
    "PrefixKV",
    "PruMerge",
    "Random",
    "Scope",
    "ShortV",
    "SnapKV",
    "SparseVILA",
    "ToMe",
    "TransPrune",
    "Uniform",
    "V2Drop",
]
