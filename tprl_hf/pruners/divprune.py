"""DivPrune: the set whose closest two tokens are farthest apart.

Alvar et al., "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models" (arXiv 2503.02175), solve
the max-min diversity problem greedily. It never looks at the question and needs no attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner


class DivPrune(SetPruner):
    """Greedy for `argmax_S min_{i != j in S} d(i, j)` with `d(i, j) = 1 - cos(v_i, v_j)`.

    The first token is the one whose nearest neighbour is farthest; then, one by one, the token whose nearest chosen
    token is farthest. A larger budget keeps what a smaller one kept.

    Args:
        **budget: see [`TokenPruner`]; no threshold.
    """

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        return farthest_points(sample.tokens, count)


def farthest_points(tokens: Tensor, count: int) -> Tensor:
    """Indices of `count` tokens of `[n, D]`, in the order in which they are chosen."""
    if count == 0:
        return torch.zeros(0, dtype=torch.long, device=tokens.device)
    directions = F.normalize(tokens.float(), dim=-1)
    distance = 1 - directions @ directions.T
    to_others = distance.clone().fill_diagonal_(torch.inf)
    chosen = [to_others.amin(dim=1).argmax()]
    nearest = distance[chosen[0]]
    for _ in range(count - 1):
        nearest = nearest.index_fill(0, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax())
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.stack(chosen)
