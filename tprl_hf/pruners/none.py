"""No pruning: the upper baseline of every table."""

import torch
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner


class NoPruner(TokenPruner):
    """Keeps every token, through the same path as all pruners."""

    def __init__(self):
        super().__init__(keep_ratio=1.0)

    def score(self, inputs: PruningInputs) -> Tensor:
        return torch.ones_like(inputs.valid, dtype=torch.float32)
