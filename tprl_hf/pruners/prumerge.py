"""PruMerge+: outliers of the vision tower's attention, an even grid beside them, and neighbours merged in.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388). It
never looks at the question.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, SetPruner

from .uniform import dither_order


class PruMerge(SetPruner):
    """Keeps tokens whose attention is an outlier, fills the budget with an even grid, and merges the rest into them.

    Outliers lie above `Q3 + 1.5 (Q3 - Q1)` of the attention a received by a sample's tokens; when the budget is
    smaller, the largest of them stay. In the paper their number sets the budget; here the caller does. A kept token
    becomes `v_i + sum_j a_j v_j` over its k most similar removed tokens j. The paper compares attention keys before
    the projector; here it is the cosine of the tokens that the LLM gets.

    Args:
        num_neighbors (`int`, defaults to 32): k; 0 merges nothing.
        **budget: see [`TokenPruner`]; no threshold.

    Raises:
        `ValueError`: for a negative `num_neighbors`.
    """

    needs_attention = True

    def __init__(self, num_neighbors: int = 32, **budget):
        super().__init__(**budget)
        if num_neighbors < 0:
            raise ValueError(f"num_neighbors must not be negative; got {num_neighbors}.")
        self.num_neighbors = num_neighbors

    def select(self, inputs: PruningInputs, counts: Tensor) -> Tensor:
        assert inputs.attention is not None
        keep_mask = torch.zeros_like(inputs.valid)
        grid_order = dither_order(inputs.layout.row, inputs.layout.column)
        for row, count in enumerate(counts.tolist()):
            index = inputs.valid[row].nonzero()[:, 0]
            attention = inputs.attention[row, index]
            is_outlier = outliers(attention)
            by_attention = attention.argsort(descending=True, stable=True)
            important = by_attention[is_outlier[by_attention]][:count]
            rest = grid_order[row, index].argsort(stable=True)
            rest = rest[~torch.isin(rest, important)][: count - len(important)]
            keep_mask[row, index[torch.cat([important, rest])]] = True
        return keep_mask

    def merge(self, inputs: PruningInputs, keep_mask: Tensor) -> Tensor | None:
        if not self.num_neighbors:
            return None
        assert inputs.attention is not None
        tokens = inputs.tokens.clone()
        for row, kept in enumerate(keep_mask):
            free = inputs.valid[row] & ~inputs.layout.protected[row]
            removed = (free & ~kept).nonzero()[:, 0]
            if len(removed):
                add_neighbors(tokens[row], (free & kept).nonzero()[:, 0], removed, inputs, row, self.num_neighbors)
        return tokens


def outliers(values: Tensor) -> Tensor:
    """Which of `[n]` lie more than 1.5 interquartile ranges above the third quartile, `bool [n]`."""
    if not len(values):
        return values.bool()
    low, high = values.float().quantile(values.new_tensor([0.25, 0.75], dtype=torch.float32))
    return values > high + 1.5 * (high - low)


def add_neighbors(out: Tensor, kept: Tensor, removed: Tensor, inputs: PruningInputs, row: int, count: int) -> None:
    """Adds to `out [N, D]` at `kept` the attention-weighted sum of the `count` most similar of `removed`."""
    assert inputs.attention is not None
    tokens, weights = inputs.tokens[row, removed].float(), inputs.attention[row, removed].float()
    directions = F.normalize(inputs.tokens[row].float(), dim=-1)
    nearest = (directions[kept] @ directions[removed].T).topk(min(count, len(removed)), dim=1).indices
    chosen = torch.zeros(len(kept), len(removed), device=out.device).scatter_(1, nearest, 1.0)
    out[kept] += ((chosen * weights) @ tokens).to(out.dtype)
