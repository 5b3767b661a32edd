"""Advantages and clipped losses of policy gradients: pure functions of tensors.

Letters: T steps, S trajectories. `exists [T, S]` tells the steps that a trajectory has; none follows one that it
does not have.
"""

import torch
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, exists: Tensor, gamma: float = 0.99, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """
    Generalized advantage estimation (eq. 20-21). Every trajectory ends with its last step: nothing is bootstrapped.

    Args:
        rewards, values (`[T, S]`), exists (`bool [T, S]`): of each step.
        gamma (`float`): discount; lam (`float`): trace decay.

    Returns:
        `advantages [T, S]` and `returns [T, S]`, both 0 where no step exists.
    """
    advantages = torch.zeros_like(rewards)
    after, value_after = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        delta = rewards[step] + gamma * value_after - values[step]
        after = (delta + gamma * lam * after) * exists[step]
        value_after = values[step] * exists[step]
        advantages[step] = after
    return advantages, (advantages + values) * exists


def discounted_returns(rewards: Tensor, exists: Tensor, gamma: float = 0.99) -> Tensor:
    """Discounted sum of the rewards from each step on, `[T, S]`."""
    returns = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        after = (rewards[step] + gamma * after) * exists[step]
        returns[step] = after
    return returns


def leave_one_out_advantages(returns: Tensor, num_rollouts: int) -> Tensor:
    """Returns `[T, S]` minus the mean of the sample's other rollouts; rollouts of one sample lie beside each other."""
    groups = returns.unflatten(1, (-1, num_rollouts))  # (T, B, R)
    others = (groups.sum(2, keepdim=True) - groups) / (num_rollouts - 1)
    return (groups - others).flatten(1)


def group_advantages(returns: Tensor, num_rollouts: int, epsilon: float = 1e-4) -> Tensor:
    """Returns `[T, S]` standardised among the rollouts of each sample, as in GRPO."""
    groups = returns.unflatten(1, (-1, num_rollouts))
    deviation = groups - groups.mean(2, keepdim=True)
    return (deviation / (groups.std(2, keepdim=True) + epsilon)).flatten(1)


def competing_advantages(advantages: Tensor, weights: Tensor) -> Tensor:
    """
    What each bit earns more than the bits of all trajectories do on average: at a budget that they share, a token is
    kept in place of another one's.

    Args:
        advantages (`[T, S, N]`): what keeping a token earns more than pruning it, 0 where that is unknown.
        weights (`[T, S, N]`): `p * (1 - p)` of each bit, what its logit does to the number of tokens kept; 0 where no
            bit was drawn.

    Returns:
        `[T, S, N]`, whose mean with these weights is 0; 0 where no bit was drawn.
    """
    mean = (advantages * weights).sum() / weights.sum().clamp(min=1e-12)
    return (advantages - mean) * (weights > 0)


def whiten(values: Tensor, exists: Tensor) -> Tensor:
    """`values [T, S]` with mean 0 and variance 1 over the steps that exist, 0 elsewhere."""
    present = values[exists]
    if present.numel() < 2:
        return values * exists
    return (values - present.mean()) / (present.std() + 1e-8) * exists


def mean_over_steps(values: Tensor, exists: Tensor) -> Tensor:
    """Mean of `values [T, S]` over the steps of each trajectory, `[S]`."""
    return (values * exists).sum(0) / exists.sum(0).clamp(min=1)


def mean_over_tokens(values: Tensor, asked: Tensor) -> Tensor:
    """Mean of `values [..., N]` over the tokens that were asked for, `[...]`."""
    return (values * asked).sum(-1) / asked.sum(-1).clamp(min=1)


def clipped_policy_loss(logratio: Tensor, advantages: Tensor, cliprange: float) -> tuple[Tensor, Tensor]:
    """
    PPO's clipped surrogate (eq. 19), to be minimised.

    Args:
        logratio: log-probability now minus that at the rollout; advantages: of the same shape.

    Returns:
        The loss and whether the clip was in effect, both of the same shape.
    """
    ratio = logratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return torch.maximum(unclipped, clipped), clipped > unclipped


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of `values` (eq. 22), not below that of values clipped around those of the rollout."""
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped
