"""VisPruner: visual attention finds the important tokens, removing duplicates the diverse ones (arXiv 2412.01818).

The TPRL paper's teacher. It never looks at the question.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner
from tprl_hf.modeling.values import COUNT, UNIT


class VisPruner(SetPruner):
    """Splits the budget between important and diverse tokens.

    Important are those to which the vision tower attends most (from its [CLS] token where it has one) in the layer
    whose features the LLM gets. Of the rest, the tokens most similar to others are removed until the budget is met.

    Args:
        important_ratio (`float`, defaults to 0.5): share of the budget for important tokens.
        removed_per_round (`int`, defaults to 8): duplicates removed at a time.
        **budget: see [`TokenPruner`]; no threshold.
    """

    needs_attention = True

    def __init__(self, important_ratio: float = 0.5, removed_per_round: int = 8, **budget):
        super().__init__(**budget)
        self.important_ratio = UNIT("important_ratio", important_ratio)
        self.removed_per_round = COUNT("removed_per_round", removed_per_round)

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        assert sample.attention is not None
        num_important = int(count * self.important_ratio)
        order = sample.attention.argsort(descending=True, stable=True)
        important, rest = order[:num_important], order[num_important:].sort().values
        diverse = remove_duplicates(sample.tokens[rest], count - num_important, self.removed_per_round)
        return torch.cat([important, rest[diverse]])


def remove_duplicates(tokens: Tensor, count: int, per_round: int) -> Tensor:
    """Indices of `count` tokens of `[n, D]` that are left when duplicates go.

    In each round every second token is compared with the others by cosine, and those closest to one of them go.
    """
    directions = F.normalize(tokens.float(), dim=-1)
    left = torch.arange(len(tokens), device=tokens.device)
    while len(left) > count:
        candidates, others = left[::2], left[1::2]
        if len(others) == 0:
            return left[:count]
        # of few tokens fewer go at a time, else the last round would take what is not a duplicate
        excess = min(per_round, len(left) - count, max(len(candidates) // 4, 1))
        similarity = (directions[candidates] @ directions[others].T).amax(dim=1)
        gone = candidates[similarity.argsort(descending=True, stable=True)[:excess]]
        left = left[~torch.isin(left, gone)]
    return left
