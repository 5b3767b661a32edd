"""CDPruner: diverse tokens, and more so where the question points.

Zhang et al., "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs" (arXiv
2506.10967), choose the most probable set of a determinantal point process, greedily (Chen et al., arXiv 1709.05135).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner

SMALLEST = 1e-10  # of a token's remaining volume, when the chosen ones already span it


class CDPruner(SetPruner):
    """Greedy for `argmax_S det(L_S)` with `L_ij = r_i * cos(v_i, v_j) * r_j`.

    The relevance `r` is the similarity to the question, brought to [0, 1] within each sample. The paper takes it from
    CLIP's text tower; here it is the mean cosine to the question's word embeddings, which every LVLM has. Without a
    question all tokens are equally relevant.

    Args:
        **budget: see [`TokenPruner`]; no threshold.
    """

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        directions = F.normalize(sample.tokens.float(), dim=-1)
        words = F.normalize(sample.query.float(), dim=-1)
        relevance = to_unit_range((directions @ words.T).sum(1) / max(len(words), 1))
        return most_probable_set(relevance[:, None] * (directions @ directions.T) * relevance, count)


def to_unit_range(values: Tensor) -> Tensor:
    """`[n]` with smallest 0 and largest 1; ones where all are equal."""
    low, high = values.min(), values.max()
    return torch.where(high > low, (values - low) / (high - low).clamp(min=SMALLEST), torch.ones_like(values))


def most_probable_set(kernel: Tensor, count: int) -> Tensor:
    """
    Greedy maximum of `det(kernel[S][:, S])` over sets S of `count` of n items.

    An item's gain is what of it lies outside the span of those chosen before; an incremental Cholesky factor keeps
    these gains, at n * count a step.

    Args:
        kernel (`[n, n]`): positive semidefinite.

    Returns:
        `int64 [count]`: indices in the order in which they are chosen.
    """
    gain = kernel.diagonal().clone()
    factor = kernel.new_zeros(count, len(kernel))
    chosen: list[Tensor] = []
    for step in range(count):
        best = gain.argmax()
        chosen.append(best)
        before = factor[:step]
        row = (kernel[best] - before[:, best] @ before) / gain[best].clamp(min=SMALLEST).sqrt()
        factor[step] = row
        # below every gain, also those that rounding made negative
        gain = (gain - row.square()).clamp(min=0.0).index_fill(0, torch.stack(chosen), -1.0)
    return torch.stack(chosen)
