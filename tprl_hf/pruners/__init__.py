"""One published method a file. Each is a [`TokenPruner`] (scores) or a [`SetPruner`] (a set chosen together).

`PRUNERS` is the only list of them. Classes are loaded when they are first used: the module imports no torch.
"""

# ruff: noqa: F401  (the imports for type checkers; `PRUNERS` makes the names)
from collections.abc import Iterator, MutableMapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tprl_hf.modeling.token_pruner import LearnedPruner, PruningInputs, SampleTokens, SetPruner, TokenPruner

    from .cdpruner import CDPruner
    from .divprune import DivPrune
    from .fastv import FastVPruner
    from .feature_norm import FeatureNormPruner
    from .none import NoPruner
    from .oracle import OraclePruner
    from .pool import PoolPruner
    from .prumerge import PruMerge
    from .query_similarity import QuerySimilarityPruner
    from .random import RandomPruner
    from .sparsevlm import SparseVLMPruner
    from .tome import ToMePruner
    from .uniform import UniformPruner
    from .visionzip import VisionZip
    from .vispruner import VisPruner


class PrunerTable(MutableMapping[str, "type[TokenPruner]"]):
    """
    Classes of pruners by the names that the command line, recipes and checkpoints use.

    Args:
        names (`dict[str, str]`): Name of each pruner and of its class. Its file has the name of the pruner, with "_"
            in place of "-".
    """

    def __init__(self, names: dict[str, str]):
        self.class_of: dict[str, str | type[TokenPruner]] = dict(names)

    def __getitem__(self, name: str) -> "type[TokenPruner]":
        found = self.class_of[name]
        if isinstance(found, str):
            found = getattr(import_module(f".{name.replace('-', '_')}", __name__), found)
            self.class_of[name] = found
        return found

    def __setitem__(self, name: str, pruner_class: "type[TokenPruner]") -> None:
        self.class_of[name] = pruner_class

    def __delitem__(self, name: str) -> None:
        del self.class_of[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.class_of)

    def __len__(self) -> int:
        return len(self.class_of)


# The methods that need no training. A new one is a file, and a line here.
PRUNERS = PrunerTable(
    {
        "none": "NoPruner",
        "random": "RandomPruner",
        "uniform": "UniformPruner",
        "pool": "PoolPruner",
        "feature-norm": "FeatureNormPruner",
        "query-similarity": "QuerySimilarityPruner",
        "divprune": "DivPrune",
        "cdpruner": "CDPruner",
        "tome": "ToMePruner",
        "visionzip": "VisionZip",
        "prumerge": "PruMerge",
        "vispruner": "VisPruner",
        "fastv": "FastVPruner",
        "sparsevlm": "SparseVLMPruner",
    }
)
# For models without a trained policy: reads the tokens alone, so that the vision tower runs as fast as unpruned.
DEFAULT_PRUNER = "divprune"

_BASES = ("LearnedPruner", "PruningInputs", "SampleTokens", "SetPruner", "TokenPruner")
_MODULE_OF: dict[str, str] = {
    **dict.fromkeys(_BASES, "tprl_hf.modeling.token_pruner"),
    "OraclePruner": "tprl_hf.pruners.oracle",
    **{str(found): f"{__name__}.{name.replace('-', '_')}" for name, found in PRUNERS.class_of.items()},
}

__all__ = ["DEFAULT_PRUNER", "PRUNERS", *sorted(_MODULE_OF)]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)
