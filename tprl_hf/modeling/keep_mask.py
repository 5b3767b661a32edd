"""From scores to keep masks. Pure functions of tensors: nothing here knows a model.

Letters: B samples, N visual tokens (padded to the longest sample of the batch), `valid` tells the real ones.
`scores` are always "higher is kept"; a keep mask is boolean and True where a token is kept.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Budget:
    """How much is kept. Exactly one of `keep_ratio`, `num_keep` and `threshold` is set.

    Args:
        keep_ratio (`float`, *optional*): Fraction of each sample's visual tokens that is KEPT, in (0, 1].
        num_keep (`int`, *optional*): Number of tokens kept of each sample; all of a sample that has fewer.
        threshold (`float`, *optional*): Tokens with a larger score are kept (eq. 16, for probabilities).
        min_keep (`int`, defaults to 1): At least so many tokens stay in a sample that has any.
        max_keep (`int`, *optional*): At most so many tokens stay in a sample.

    Raises:
        `ValueError`: when none or several of the three are set, or one is out of its range.
    """

    keep_ratio: float | None = None
    num_keep: int | None = None
    threshold: float | None = None
    min_keep: int = 1
    max_keep: int | None = None

    def __post_init__(self):
        given = {name: getattr(self, name) for name in ("keep_ratio", "num_keep", "threshold")}
        given = {name: value for name, value in given.items() if value is not None}
        if len(given) != 1:
            listed = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
            raise ValueError(f"A budget is exactly one of keep_ratio, num_keep and threshold; got {listed}.")
        if self.keep_ratio is not None and not 0 < self.keep_ratio <= 1:
            raise ValueError(
                f"keep_ratio is the fraction of visual tokens that is kept and lies in (0, 1]; got {self.keep_ratio}. "
                "To keep all tokens pass keep_ratio=1.0 or prune=False."
            )
        if self.num_keep is not None and self.num_keep < 1:
            raise ValueError(f"num_keep is at least 1; got {self.num_keep}. To drop an image pass keep_mask.")
        if self.threshold is not None and self.threshold != self.threshold:
            raise ValueError(f"threshold must be a number; got {self.threshold}.")
        if self.min_keep < 0 or (self.max_keep is not None and self.max_keep < max(self.min_keep, 1)):
            raise ValueError(
                f"Need 0 <= min_keep <= max_keep; got min_keep={self.min_keep}, max_keep={self.max_keep}."
            )


def keep_counts(num_visual: Tensor, budget: Budget) -> Tensor:
    """Number of tokens to keep of each sample, `int64 [B]`, for a `keep_ratio` or `num_keep` budget.

    Each sample has its own budget, so that no result depends on the samples that share its batch. A sample with fewer
    visual tokens than `num_keep` keeps all of them.
    """
    if budget.num_keep is not None:
        counts = torch.full_like(num_visual, budget.num_keep)
    elif budget.keep_ratio is not None:
        ratio = budget.keep_ratio
        counts = torch.tensor([round(ratio * n) for n in num_visual.tolist()], device=num_visual.device)
    else:
        raise ValueError("A threshold keeps as many tokens as lie above it; it has no counts.")
    return clamp_counts(counts.long(), num_visual, budget)


def clamp_counts(counts: Tensor, num_visual: Tensor, budget: Budget) -> Tensor:
    """`counts [B]` within the budget's `min_keep` and `max_keep` and what there is."""
    counts = counts.clamp(min=budget.min_keep)
    if budget.max_keep is not None:
        counts = counts.clamp(max=budget.max_keep)
    return torch.minimum(counts, num_visual)


def keep_top_k(scores: Tensor, valid: Tensor, counts: Tensor, protected: Tensor | None = None) -> Tensor:
    """Keeps the `counts [B]` (on any device) highest `scores [B, N]` of each sample; returns `bool [B, N]`.

    Among equal scores the earlier token is kept. `protected` tokens (row separators) come first and count in the
    budget; a sample that has tokens besides them keeps at least one of those.
    """
    scores, counts = scores.masked_fill(~valid, -torch.inf), counts.to(scores.device)
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
