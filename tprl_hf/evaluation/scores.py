"""Moved to `tprl_hf.answer_rules`; this name works until version 0.2."""

import warnings

from tprl_hf.answer_rules import *  # noqa: F403

warnings.warn("tprl_hf.evaluation.scores has moved to tprl_hf.answer_rules.", DeprecationWarning, stacklevel=2)
