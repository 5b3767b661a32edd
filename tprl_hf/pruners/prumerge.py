"""PruMerge+: outliers of the vision tower's attention, an even grid beside them, and neighbours merged in.

Shang et al., "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models" (arXiv 2403.15388). It
never looks at the question.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner
from tprl_hf.modeling.values import whole

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
        self.num_neighbors = whole(0)("num_neighbors", num_neighbors)

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        assert sample.attention is not None
        by_attention = sample.attention.argsort(descending=True, stable=True)
        important = by_attention[outliers(sample.attention)[by_attention]][:count]
        grid = dither_order(sample.layout.row, sample.layout.column).argsort(stable=True)
        return torch.cat([important, grid[~torch.isin(grid, important)][: count - len(important)]])

    def join(self, sample: SampleTokens, kept: Tensor) -> Tensor | None:
        """Each kept token plus the attention-weighted sum of the `num_neighbors` most similar removed ones."""
        removed = (~kept).nonzero()[:, 0]
        if not self.num_neighbors or not len(removed):
            return None
        assert sample.attention is not None
        directions = F.normalize(sample.tokens.float(), dim=-1)
        similarity = directions[kept] @ directions[removed].T
        nearest = similarity.argsort(dim=1, descending=True, stable=True)[:, : self.num_neighbors]
        weights = torch.zeros_like(similarity).scatter_(1, nearest, 1.0) * sample.attention[removed].float()
        joined = sample.tokens.clone()
        joined[kept] += (weights @ sample.tokens[removed].float()).to(joined.dtype)
        return joined


def outliers(values: Tensor) -> Tensor:
    """Which of `[n]` lie more than 1.5 interquartile ranges above the third quartile, `bool [n]`."""
    if not len(values):
        return values.bool()
    low, high = values.float().quantile(values.new_tensor([0.25, 0.75], dtype=torch.float32))
    return values > high + 1.5 * (high - low)
