"""One file for each published system, grouped by the place where its main idea acts."""

from foveate.methods.before_encoder.docprune import DocPrune
from foveate.methods.before_encoder.downsample import Downsample
from foveate.methods.before_encoder.index_preserving import IndexPreserving
from foveate.methods.before_encoder.pixelprune import PixelPrune
from foveate.methods.before_llm.apet import ApET
from foveate.methods.before_llm.cdpruner import CDPruner
from foveate.methods.before_llm.coin import CoIn
from foveate.methods.before_llm.core import CORE
from foveate.methods.before_llm.divprune import DivPrune
from foveate.methods.before_llm.dtr import DTR
from foveate.methods.before_llm.duet_vlm import DuetVLM
from foveate.methods.before_llm.embedlens import EmbedLens
from foveate.methods.before_llm.evs import EVS
from foveate.methods.before_llm.hawk import Hawk
from foveate.methods.before_llm.hiprune import HiPrune
from foveate.methods.before_llm.merge3d import Merge3D
from foveate.methods.before_llm.metom import MeToM
from foveate.methods.before_llm.omnizip_av import OmniZipAV
from foveate.methods.before_llm.pool import Pool
from foveate.methods.before_llm.ppe import PPE
from foveate.methods.before_llm.prumerge import PruMerge
from foveate.methods.before_llm.random import Random
from foveate.methods.before_llm.scope import Scope
from foveate.methods.before_llm.score import SCoRe
from foveate.methods.before_llm.uniform import Uniform
from foveate.methods.before_llm.vidcom2 import VidCom2
from foveate.methods.before_llm.visionzip import VisionZip
from foveate.methods.before_llm.zoo_prune import ZOOPrune
from foveate.methods.in_encoder.flowcut import FlowCut
from foveate.methods.in_encoder.folder import Folder
from foveate.methods.in_encoder.stc import STC
from foveate.methods.in_encoder.tome import ToMe
from foveate.methods.in_llm.alvts import ALVTS
from foveate.methods.in_llm.blink import Blink
from foveate.methods.in_llm.btp import BTP
from foveate.methods.in_llm.dart import DART
from foveate.methods.in_llm.fastv import FastV
from foveate.methods.in_llm.feather import Feather
from foveate.methods.in_llm.halfv import HalfV
from foveate.methods.in_llm.hi_lo_prune import HiLoPrune
from foveate.methods.in_llm.hidrop import HiDrop
from foveate.methods.in_llm.information_horizon import InformationHorizon
from foveate.methods.in_llm.ivc_prune import IVCPrune
from foveate.methods.in_llm.meteor import Meteor
from foveate.methods.in_llm.modes import MoDES
from foveate.methods.in_llm.prune2drive import Prune2Drive
from foveate.methods.in_llm.pyramiddrop import PyramidDrop
from foveate.methods.in_llm.shortv import ShortV
from foveate.methods.in_llm.sparsevlm import SparseVLM
from foveate.methods.in_llm.transprune import TransPrune
from foveate.methods.in_llm.uat import UAT
from foveate.methods.in_llm.v2drop import V2Drop
from foveate.methods.in_llm.vlm_pruner import VLMPruner
from foveate.methods.kv_cache.aircache import AirCache
from foveate.methods.kv_cache.attentionpack import AttentionPack
from foveate.methods.kv_cache.flashcache import FlashCache
from foveate.methods.kv_cache.h2o import H2O
from foveate.methods.kv_cache.hermes import Hermes
from foveate.methods.kv_cache.kivi import KIVI
from foveate.methods.kv_cache.mixkv import MixKV
from foveate.methods.kv_cache.prefixkv import PrefixKV
from foveate.methods.kv_cache.press import Press
from foveate.methods.kv_cache.pyramidkv import PyramidKV
from foveate.methods.kv_cache.random_kv import RandomKV
from foveate.methods.kv_cache.snapkv import SnapKV
from foveate.methods.kv_cache.sparsevila import SparseVILA
from foveate.methods.kv_cache.streamingllm import StreamingLLM
from foveate.methods.weights.awq import AWQ
from foveate.methods.weights.dasq import DASQ
from foveate.methods.weights.gptaq import GPTAQ
from foveate.methods.weights.gptq import GPTQ
from foveate.methods.weights.ls_vit import LSViT
from foveate.methods.weights.masquant import MASQuant
from foveate.methods.weights.mbq import MBQ
from foveate.methods.weights.qig import QIG
from foveate.methods.weights.quant_experts import QuantExperts
from foveate.methods.weights.rtn import RTN
from foveate.methods.weights.smoothquant import SmoothQuant
from foveate.methods.weights.vlm_ptq import VLMPTQ

__all__ = [
    "ALVTS",
    "AWQ",
    "BTP",
    "CORE",
    "DART",
    "DASQ",
    "DTR",
    "EVS",
    "GPTAQ",
    "GPTQ",
    "H2O",
    "KIVI",
    "MBQ",
    "PPE",
    "QIG",
    "RTN",
    "STC",
    "UAT",
    "VLMPTQ",
    "AirCache",
    "ApET",
    "AttentionPack",
    "Blink",
    "CDPruner",
    "CoIn",
    "DivPrune",
    "DocPrune",
    "Downsample",
    "DuetVLM",
    "EmbedLens",
    "FastV",
    "Feather",
    "FlashCache",
    "FlowCut",
    "Folder",
    "HalfV",
    "Hawk",
    "Hermes",
    "HiDrop",
    "HiLoPrune",
    "HiPrune",
    "IVCPrune",
    "IndexPreserving",
    "InformationHorizon",
    "LSViT",
    "MASQuant",
    "MeToM",
    "Merge3D",
    "Meteor",
    "MixKV",
    "MoDES",
    "OmniZipAV",
    "PixelPrune",
    "Pool",
    "PrefixKV",
    "Press",
    "PruMerge",
    "Prune2Drive",
    "PyramidDrop",
    "PyramidKV",
    "QuantExperts",
    "Random",
    "RandomKV",
    "SCoRe",
    "Scope",
    "ShortV",
    "SmoothQuant",
    "SnapKV",
    "SparseVILA",
    "SparseVLM",
    "StreamingLLM",
    "ToMe",
    "TransPrune",
    "Uniform",
    "V2Drop",
    "VLMPruner",
    "VidCom2",
    "VisionZip",
    "ZOOPrune",
]
