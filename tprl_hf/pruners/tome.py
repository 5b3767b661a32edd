"""ToMe: pairs of similar tokens are averaged until few are left.

Bolya et al., "Token Merging: Your ViT But Faster" (arXiv 2210.09461), merge between the blocks of the vision tower.
Here the same matching runs once, between the projector and the LLM. It never looks at the question and needs no
attention.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tprl_hf.modeling.token_pruner import SampleTokens, SetPruner


class ToMePruner(SetPruner):
    """Bipartite soft matching, in rounds.

    In a round every second token is matched with the most similar of the others; the best matches are merged into the
    latter, as means weighted by how many tokens each already stands for. A round removes at most half. A merged token
    keeps the place of the one it was merged into. Rows for deeper LLM layers (deepstack) are not merged.

    Args:
        **budget: see [`TokenPruner`]; no threshold.
    """

    def select(self, sample: SampleTokens, count: int) -> Tensor:
        return merge_pairs(sample.tokens, count)[0]

    def join(self, sample: SampleTokens, kept: Tensor) -> Tensor:
        left, means = merge_pairs(sample.tokens, int(kept.sum()))
        return sample.tokens.index_copy(0, left, means)


def merge_pairs(tokens: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """
    Args:
        tokens (`[n, D]`): of one sample.
        count (`int`): how many shall be left.

    Returns:
        `int64 [count]`: indices of those that are left, ascending; and what they have become, `[count, D]`.
    """
    left = torch.arange(len(tokens), device=tokens.device)
    sums, sizes = tokens.float(), torch.ones_like(left, dtype=torch.float32)
    while len(left) > max(count, 1):
        directions = F.normalize(sums / sizes[:, None], dim=-1)
        places = torch.arange(len(left), device=left.device)
        sources, targets = places[::2], places[1::2]
        best = (directions[sources] @ directions[targets].T).max(dim=1)
        num_merged = min(len(left) - count, len(sources), len(left) - 1)
        order = best.values.argsort(descending=True, stable=True)[:num_merged]
        gone, into = sources[order], targets[best.indices[order]]
        sums = sums.index_add(0, into, sums[gone])
        sizes = sizes.index_add(0, into, sizes[gone])
        stays = torch.ones(len(left), dtype=torch.bool, device=left.device).index_fill(0, gone, False)
        left, sums, sizes = left[stays], sums[stays], sizes[stays]
    left, sums, sizes = left[:count], sums[:count], sizes[:count]
    return left, (sums / sizes[:, None]).to(tokens.dtype)
