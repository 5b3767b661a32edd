"""Query similarity: keeps the tokens that look like the question's words.

After TRIM (Song et al., "Less is More: A Simple yet Effective Token Reduction Method for Efficient Multi-modal LLMs",
arXiv 2409.10994), which compares CLIP's text vector with CLIP's patch features. Most LVLMs have no text tower; here
both live in the LLM's input space, where projectors align them only loosely. The mean over the words orders the tokens
as the cosine to the mean of the words' directions does: TRIM's formula with that in place of the pooled text. TRIM's
one extra token, the mean of what was removed, is left out, and the budget replaces its interquartile rule.
"""

import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import PruningInputs, TokenPruner
from tprl_hf.modeling.values import one_of


class QuerySimilarityPruner(TokenPruner):
    """`score_i` = mean, or maximum, over the question's words q_l of `cos(v_i, q_l)`.

    Without a question all scores are 0, and the first tokens are kept.

    Args:
        reduce (`"mean"` or `"max"`, defaults to `"mean"`): over the words.
        **budget: see [`TokenPruner`].

    Raises:
        `ValueError`: for another `reduce`.
    """

    def __init__(self, reduce: str = "mean", **budget):
        super().__init__(**budget)
        self.reduce = one_of(("mean", "max"))("reduce", reduce)

    def score(self, inputs: PruningInputs) -> Tensor:
        similarity = query_similarity(inputs)
        if self.reduce == "mean":
            return mean_over_query(similarity, inputs.query_valid)
        if similarity.shape[2] == 0:
            return similarity.sum(2)
        has_query = inputs.query_valid.any(1)[:, None]
        return similarity.masked_fill(~inputs.query_valid[:, None], -1.0).amax(2).masked_fill(~has_query, 0.0)


def query_similarity(inputs: PruningInputs) -> Tensor:
    """Cosine of each token and each word of the question, float32 `[B, N, L]`."""
    tokens = F.normalize(inputs.tokens.float(), dim=-1)
    return tokens @ F.normalize(inputs.query.float(), dim=-1).transpose(1, 2)


def mean_over_query(similarity: Tensor, query_valid: Tensor) -> Tensor:
    """Mean of `[B, N, L]` over the words that are there, `[B, N]`; 0 without any."""
    total = (similarity * query_valid[:, None]).sum(2)
    return total / query_valid.sum(1).clamp(min=1)[:, None]
