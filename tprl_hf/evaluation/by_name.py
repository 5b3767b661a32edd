"""Moved to `tprl_hf.loading` and `tprl_hf.pruners.by_name`; this name works until version 0.2."""

import warnings

from tprl_hf.loading import load_model
from tprl_hf.pruners.by_name import make_pruner

__all__ = ["load_model", "make_pruner"]

warnings.warn(
    "tprl_hf.evaluation.by_name has moved to tprl_hf.loading and tprl_hf.pruners.by_name.",
    DeprecationWarning,
    stacklevel=2,
)
