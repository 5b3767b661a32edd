"""Keep sets drawn without replacement: the budget is exact in every rollout. Pure functions of tensors.

Tokens are drawn one after the other, each with probability `softmax(logits)` among those that are left: the model of
Plackett (1975) and Luce (1959). TwigVLM++ (arXiv 2503.14075 v3) and CaCoVID (2602.01649) draw their rollouts so.

Letters: S trajectories, N tokens. `ranks [S, N]` are the places of the drawn tokens in the order of their draw, from
0; `NOT_DRAWN` for all others.
"""

import torch
from torch import Tensor

NOT_DRAWN = -1
# Of tokens that are not drawn from: exp() of it is 0 beside any logit, and unlike -inf it has a gradient of 0.
_NEVER = -1e9


def draw_ordered(logits: Tensor, action_mask: Tensor, counts: Tensor, generator: torch.Generator) -> Tensor:
    """
    Draws `counts [S]` of the tokens in `action_mask [S, N]` without replacement.

    The largest of `logits + Gumbel noise`, in their order, are such a draw (Yellott 1977).

    Returns:
        `ranks`, int64 `[S, N]`.
    """
    uniform = torch.rand(logits.shape, generator=generator, device=logits.device, dtype=logits.dtype)
    noise = -(-uniform.clamp(min=1e-20).log()).clamp(min=1e-20).log()
    order = (logits + noise).masked_fill(~action_mask, -torch.inf).argsort(dim=1, descending=True)
    places = torch.arange(logits.shape[1], device=logits.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(1, order, places)
    return torch.where((ranks < counts[:, None]) & action_mask, ranks, NOT_DRAWN)


def ordered_logprobs(logits: Tensor, action_mask: Tensor, ranks: Tensor) -> Tensor:
    """
    Log-probability of each draw: of a token, among those that were left when it was drawn. Their sum is that of the
    ordered set.

    Args:
        logits (`[S, N]`), action_mask (`bool [S, N]`), ranks (`int64 [S, N]`): see [`draw_ordered`].

    Returns:
        `[S, N]`, 0 where a token was not drawn.
    """
    drawn = ranks != NOT_DRAWN
    order = torch.where(drawn, ranks, logits.shape[1]).argsort(dim=1, stable=True)
    masked = logits.masked_fill(~action_mask, _NEVER)
    in_order = masked.gather(1, order)
    left = in_order.flip(1).logcumsumexp(1).flip(1)  # of this token and all that follow
    return torch.zeros_like(logits).scatter(1, order, in_order - left).masked_fill(~drawn, 0.0)
