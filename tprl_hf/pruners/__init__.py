"""One published method a file. Each is a [`TokenPruner`] (scores) or a [`SetPruner`] (a set chosen together)."""

from tprl_hf.modeling.token_pruner import LearnedPruner, PruningInputs, SetPruner, TokenPruner

from .cdpruner import CDPruner
from .divprune import DivPrune
from .fastv import FastVPruner
from .feature_norm import FeatureNormPruner
from .none import NoPruner
from .oracle import OraclePruner
from .prumerge import PruMerge
from .query_similarity import QuerySimilarityPruner
from .random import RandomPruner
from .sparsevlm import SparseVLMPruner
from .tome import ToMePruner
from .uniform import UniformPruner
from .visionzip import VisionZip
from .vispruner import VisPruner

__all__ = [
    "CDPruner",
    "DivPrune",
    "FastVPruner",
    "FeatureNormPruner",
    "LearnedPruner",
    "NoPruner",
    "OraclePruner",
    "PruMerge",
    "PruningInputs",
    "QuerySimilarityPruner",
    "RandomPruner",
    "SetPruner",
    "SparseVLMPruner",
    "ToMePruner",
    "TokenPruner",
    "UniformPruner",
    "VisPruner",
    "VisionZip",
]
