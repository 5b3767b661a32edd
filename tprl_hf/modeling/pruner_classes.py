"""The pruners that a checkpoint can name, as `TPRLConfig.pruner` does.

`tprl_hf` replaces this table by its own, `tprl_hf.pruners.PRUNERS`. A checkpoint that brings its code along has
another version of this file, which imports the one pruner that the checkpoint uses.
"""

from collections.abc import Mapping

from .token_pruner import TokenPruner

PRUNER_CLASSES: Mapping[str, type[TokenPruner]] = {}
