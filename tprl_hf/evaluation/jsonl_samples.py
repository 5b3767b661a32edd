"""Moved to `tprl_hf.data.jsonl`; this name works until version 0.2."""

import warnings

from tprl_hf.data.jsonl import jsonl_samples

__all__ = ["jsonl_samples"]

warnings.warn("tprl_hf.evaluation.jsonl_samples has moved to tprl_hf.data.jsonl.", DeprecationWarning, stacklevel=2)
