"""One file for each published system, grouped by the place where its main idea acts."""

from foveate.methods.before_encoder.index_preserving import IndexPreserving
from foveate.methods.before_encoder.pixelprune import PixelPrune
from foveate.methods.before_llm.cdpruner import CDPruner
from foveate.methods.before_llm.coin import CoIn
from foveate.methods.before_llm.divprune import DivPrune
from foveate.methods.before_llm.evs import EVS
from foveate.methods.before_llm.hiprune import HiPrune
from foveate.methods.before_llm.metom import MeToM
from foveate.methods.before_llm.ppe import PPE
from foveate.methods.before_llm.prumerge import PruMerge
from foveate.methods.before_llm.random import Random
from foveate.methods.before_llm.scope import Scope
from foveate.methods.before_llm.score import SCoRe
from foveate.methods.before_llm.uniform import Uniform
from foveate.methods.in_encoder.folder import Folder
from foveate.methods.in_encoder.tome import ToMe
from foveate.methods.in_llm.alvts import ALVTS
from foveate.methods.in_llm.fastv import FastV
from foveate.methods.in_llm.feather import Feather
from foveate.methods.in_llm.hidrop import HiDrop
from foveate.methods.in_llm.ivc_prune import IVCPrune
from foveate.methods.in_llm.prune2drive import Prune2Drive
from foveate.methods.in_llm.pyramiddrop import PyramidDrop
from foveate.methods.in_llm.shortv import ShortV
from foveate.methods.in_llm.transprune import TransPrune
from foveate.methods.in_llm.v2drop import V2Drop
from foveate.methods.kv_cache.mixkv import MixKV
from foveate.methods.kv_cache.prefixkv import PrefixKV
from foveate.methods.kv_cache.snapkv import SnapKV
from foveate.methods.kv_cache.sparsevila import SparseVILA

__all__ = [
    "ALVTS",
    "EVS",
    "PPE",
    "CDPruner",
    "CoIn",
    "DivPrune",
    "FastV",
    "Feather",
    "Folder",
    "HiDrop",
    "HiPrune",
    "IVCPrune",
    "IndexPreserving",
    "MeToM",
    "MixKV",
    "PixelPrune",
    "PrefixKV",
    "PruMerge",
    "Prune2Drive",
    "PyramidDrop",
    "Random",
    "SCoRe",
    "Scope",
    "ShortV",
    "SnapKV",
    "SparseVILA",
    "ToMe",
    "TransPrune",
    "Uniform",
    "V2Drop",
]
