"""How much is kept: what a call says about it, and the number of tokens that follows for each sample."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .configuration_tprl import CHECKS, TPRLConfig, given_budget, refuse_contradictory_budget
from .values import check_fields, flag, optional, shown, wrong

LARGEST = 2**62  # number that a tensor takes; there are fewer tokens
BUDGET_CHECKS = {name: CHECKS[name] for name in ("keep_ratio", "num_keep", "threshold", "min_keep", "max_keep")}


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
        check_fields(self, BUDGET_CHECKS)
        refuse_contradictory_budget(self)
        if not given_budget(self):
            raise ValueError("A budget is exactly one of keep_ratio, num_keep and threshold; got none. Pass one.")


def keep_counts(num_visual: Tensor, budget: Budget) -> Tensor:
    """Number of tokens to keep of each sample, `int64 [B]`, for a `keep_ratio` or `num_keep` budget.

    Each sample has its own budget, so that no result depends on the samples that share its batch. A sample with fewer
    visual tokens than `num_keep` keeps all of them.
    """
    if budget.num_keep is not None:
        counts = torch.full_like(num_visual, min(budget.num_keep, LARGEST))
    elif budget.keep_ratio is not None:
        ratio = budget.keep_ratio
        counts = torch.tensor([round(ratio * n) for n in num_visual.tolist()], device=num_visual.device)
    else:
        raise ValueError("A threshold keeps as many tokens as lie above it; it has no counts.")
    return clamp_counts(counts.long(), num_visual, budget)


def clamp_counts(counts: Tensor, num_visual: Tensor, budget: Budget) -> Tensor:
    """`counts [B]` within the budget's `min_keep` and `max_keep` and what there is."""
    counts = counts.clamp(min=min(budget.min_keep, LARGEST))
    if budget.max_keep is not None:
        counts = counts.clamp(max=min(budget.max_keep, LARGEST))
    return torch.minimum(counts, num_visual)


def refuse_several(given: dict[str, Any]) -> None:
    """Raises `ValueError` when a call says several things about pruning."""
    if len(given) > 1:
        listed = ", ".join(f"{name}={shown(v)}" for name, v in given.items())
        raise ValueError(f"Pass only one of keep_ratio, num_keep, threshold, prune and keep_mask; got {listed}.")


def refuse_other_masks(keep_mask: Any) -> None:
    """Raises `ValueError` for a `keep_mask` that is not a bool tensor with one axis."""
    if keep_mask is not None and not (
        isinstance(keep_mask, Tensor) and keep_mask.dtype == torch.bool and keep_mask.ndim == 1
    ):
        what = "bool of shape (V,), one entry for each of the batch's V visual tokens in placeholder order"
        raise wrong("keep_mask", keep_mask, what, "Pass a torch tensor.")


def bounds_of(config: Any) -> dict[str, Any]:
    """`min_keep` and `max_keep` of a config, which bound each [`Budget`] of its model."""
    return {"min_keep": config.min_keep, "max_keep": config.max_keep}


def within_bounds(budget: Budget, config: Any) -> Budget:
    """A budget under its own bounds and those of the config, whichever is narrower."""
    most = [bound for bound in (budget.max_keep, config.max_keep) if bound is not None]
    return replace(budget, min_keep=max(budget.min_keep, config.min_keep), max_keep=min(most, default=None))


def resolve_choice(
    keep_ratio: float | None,
    num_keep: int | None,
    threshold: float | None,
    prune: bool | None,
    keep_mask: Tensor | None,
    pruner_budget: Budget | None,
    pruner_was_chosen: bool,
    config: TPRLConfig,
) -> Budget | Tensor | None:
    """What a call of `prune`, `forward` or `generate` does with the visual tokens.

    Returns:
        A [`Budget`] for the pruner: that of the call, else the pruner's own, else the config's, always within the
        config's `min_keep` and `max_keep`. Or the user's `keep_mask`. Or `None`: all tokens stay, and nothing is
        pruned.

    Raises:
        `ValueError`: when the call says several things or says one wrongly, or pruning was asked for and nobody names
            a budget.
    """
    prune = optional(flag)("prune", prune)
    refuse_other_masks(keep_mask)
    budget: dict[str, Any] = {"keep_ratio": keep_ratio, "num_keep": num_keep, "threshold": threshold}
    given = {n: v for n, v in {**budget, "prune": prune, "keep_mask": keep_mask}.items() if v is not None}
    refuse_several(given)
    if keep_mask is not None or prune is False:
        return keep_mask
    bounds = bounds_of(config)
    if given and prune is None:
        return Budget(**budget, **bounds)
    if pruner_budget is not None:
        return within_bounds(pruner_budget, config)
    default = {name: getattr(config, name) for name in budget}
    if any(value is not None for value in default.values()):
        return Budget(**default, **bounds)
    if prune or pruner_was_chosen:
        raise ValueError(
            "No budget: pass keep_ratio, num_keep or threshold in the call, to the pruner, or in the config."
        )
    return None
