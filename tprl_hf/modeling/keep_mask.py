"""From scores to keep masks. Pure functions of tensors: nothing here knows a model.

Letters: B samples, N visual tokens (padded to the longest sample of the batch), `valid` tells the real ones.
`scores` are always "higher is kept"; a keep mask is boolean and True where a token is kept.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .budget import Budget, clamp_counts


def keep_top_k(scores: Tensor, valid: Tensor, counts: Tensor, protected: Tensor | None = None) -> Tensor:
    """Keeps the `counts [B]` (on any device) highest `scores [B, N]` of each sample; returns `bool [B, N]`.

    Among equal scores the earlier token is kept. A score of NaN is as low as one of -inf. `protected` tokens (row
    separators) come first and count in the budget; a sample that has tokens besides them keeps at least one of those.

    If no score is off by more than `e`, the kept tokens are those of the exact scores, but for tokens whose exact
    score is at most `2 * e` from the other side of the cut.
    """
    # finite, so that real tokens come before padding, and separators before them
    lowest, highest = torch.finfo(scores.dtype).min, torch.finfo(scores.dtype).max
    scores = scores.nan_to_num(nan=lowest, posinf=highest, neginf=lowest).masked_fill(~valid, -torch.inf)
    counts = counts.to(scores.device)
    if protected is not None:
        protected = protected & valid
        scores = scores.masked_fill(protected, torch.inf)
        num_protected, num_valid = protected.sum(1), valid.sum(1)
        at_least = num_protected + (num_valid > num_protected).long()
        counts = torch.where(counts > 0, torch.maximum(counts, at_least), counts)
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(
        1, order, torch.arange(scores.shape[1], device=order.device).expand_as(order)
    )
    return (rank < counts[:, None]) & valid


def keep_above_threshold(scores: Tensor, valid: Tensor, budget: Budget, protected: Tensor | None = None) -> Tensor:
    """Keeps tokens with `scores [B, N]` above `budget.threshold` (eq. 16), within min_keep and max_keep."""
    assert budget.threshold is not None
    counts = ((scores > budget.threshold) & valid).sum(1)
    if protected is not None:
        counts = counts + (protected & valid & ~(scores > budget.threshold)).sum(1)
    return keep_top_k(scores, valid, clamp_counts(counts, valid.sum(1), budget), protected)


def sample_keep_mask(
    logits: Tensor, valid: Tensor, discount: float = 1.0, generator: torch.Generator | None = None
) -> Tensor:
    """Draws `a ~ Bernoulli(discount * sigmoid(logits))` (eq. 14, `discount` is lambda_disc ** t); `bool [B, N]`."""
    probs = discount * logits.sigmoid()
    noise = torch.rand(probs.shape, generator=generator, device=probs.device, dtype=probs.dtype)
    return (noise < probs) & valid


def keep_logprobs(logits: Tensor, keep_mask: Tensor, valid: Tensor, discount: float = 1.0) -> Tensor:
    """Log-probability of each bit of `keep_mask` under eq. 14, float `[B, N]`, 0 where not `valid`.

    The PPO ratio needs the same `discount` as the sampling had.
    """
    logprob_keep, logprob_prune = _log_odds_parts(logits, discount)
    return torch.where(keep_mask, logprob_keep, logprob_prune).masked_fill(~valid, 0.0)


def keep_entropy(logits: Tensor, valid: Tensor, discount: float = 1.0) -> Tensor:
    """Entropy in nats of each keep bit under eq. 14, float `[B, N]`, 0 where not `valid`."""
    probs = discount * logits.sigmoid()
    logprob_keep, logprob_prune = _log_odds_parts(logits, discount)
    return -(probs * logprob_keep + (1 - probs) * logprob_prune).masked_fill(~valid, 0.0)


def _log_odds_parts(logits: Tensor, discount: float) -> tuple[Tensor, Tensor]:
    """`log p` and `log(1 - p)` for p = discount * sigmoid(logits), finite with finite gradients at any logits."""
    logprob_keep = F.logsigmoid(logits) + math.log(discount)
    if discount == 1.0:
        return logprob_keep, F.logsigmoid(-logits)
    return logprob_keep, torch.log1p(-discount * logits.sigmoid())
