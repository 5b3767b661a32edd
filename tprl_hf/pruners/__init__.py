"""One published method a file. Each is a [`TokenPruner`] (scores) or a [`SetPruner`] (a set chosen together)."""

from tprl_hf.modeling.token_pruner import LearnedPruner, PruningInputs, SetPruner, TokenPruner

from .none import NoPruner
from .random import RandomPruner
from .uniform import UniformPruner
from .vispruner import VisPruner

__all__ = [
    "LearnedPruner",
    "NoPruner",
    "PruningInputs",
    "RandomPruner",
    "SetPruner",
    "TokenPruner",
    "UniformPruner",
    "VisPruner",
]
