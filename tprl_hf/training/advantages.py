"""Advantages and clipped losses of policy gradients: pure functions of tensors.

Letters: T steps, S trajectories. `step_mask [T, S]` tells the steps that a trajectory has; none follows one that it
does not have.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def generalized_advantages(
    rewards: Tensor, values: Tensor, step_mask: Tensor, gamma: float = 0.99, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """
    Generalized advantage estimation (eq. 20-21). Every trajectory ends with its last step: nothing is bootstrapped.

    Args:
        rewards, values (`[T, S]`), step_mask (`bool [T, S]`): of each step.
        gamma (`float`): discount; lam (`float`): trace decay.

    Returns:
        `advantages [T, S]` and `returns [T, S]`, both 0 where no step exists.
    """
    advantages = torch.zeros_like(rewards)
    after, value_after = torch.zeros_like(rewards[0]), torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        delta = rewards[step] + gamma * value_after - values[step]
        after = (delta + gamma * lam * after) * step_mask[step]
        value_after = values[step] * step_mask[step]
        advantages[step] = after
    return advantages, (advantages + values) * step_mask


def discounted_returns(rewards: Tensor, step_mask: Tensor, gamma: float = 0.99) -> Tensor:
    """Discounted sum of the rewards from each step on, `[T, S]`."""
    returns = torch.zeros_like(rewards)
    after = torch.zeros_like(rewards[0])
    for step in reversed(range(len(rewards))):
        after = (rewards[step] + gamma * after) * step_mask[step]
        returns[step] = after
    return returns


def leave_one_out_advantages(returns: Tensor, num_generations: int, is_known: Tensor | None = None) -> Tensor:
    """
    Returns `[T, S]` minus the mean of the sample's other rollouts; rollouts of one sample lie beside each other. Of
    those that are not known, `bool [S]`, see [`fill_with_group_mean`].
    """
    groups = returns.unflatten(1, (-1, num_generations))  # (T, B, R)
    others = (groups.sum(2, keepdim=True) - groups) / (num_generations - 1)
    advantages = groups - others
    if is_known is not None:  # the mean of the known others
        count = count_known(is_known, num_generations)
        advantages = advantages * (count / (count - 1).clamp(min=1)) / (num_generations / (num_generations - 1))
    return advantages.flatten(1)


def group_advantages(
    returns: Tensor, num_generations: int, is_known: Tensor | None = None, epsilon: float = 1e-4
) -> Tensor:
    """
    Returns `[T, S]` standardised among the rollouts of each sample, as in GRPO. Of those that are not known,
    `bool [S]`, see [`fill_with_group_mean`].
    """
    groups = returns.unflatten(1, (-1, num_generations))
    deviation = groups - groups.mean(2, keepdim=True)
    spread = group_spread(returns, num_generations, is_known)[..., None]
    return (deviation / (spread + epsilon)).flatten(1)


def group_spread(returns: Tensor, num_generations: int, is_known: Tensor | None = None) -> Tensor:
    """Standard deviation of returns `[T, S]` among the known rollouts of each sample, `[T, B]`."""
    spread = returns.unflatten(1, (-1, num_generations)).std(2)
    if is_known is None:
        return spread
    count = count_known(is_known, num_generations)[..., 0]
    return spread * ((num_generations - 1) / (count - 1).clamp(min=1)).sqrt()


def count_known(is_known: Tensor, num_generations: int) -> Tensor:
    """How many rollouts of each sample are known, of `bool [S]`: `[1, B, 1]`."""
    return is_known.view(1, -1, num_generations).sum(2, keepdim=True)


def fill_with_group_mean(returns: Tensor, is_known: Tensor, num_generations: int) -> Tensor:
    """
    Returns `[T, S]` of which those that are not known, `bool [S]`, become the mean of their group: they have no
    advantage, and those of the others are as without them.
    """
    groups, known = returns.unflatten(1, (-1, num_generations)), is_known.view(1, -1, num_generations)
    mean = (groups * known).sum(2, keepdim=True) / known.sum(2, keepdim=True).clamp(min=1)
    return torch.where(known, groups, mean).flatten(1)


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


def whiten(values: Tensor, step_mask: Tensor) -> Tensor:
    """`values [T, S]` with mean 0 and variance 1 over the steps that exist, 0 elsewhere."""
    present = values[step_mask]
    if present.numel() < 2:
        return values * step_mask
    return (values - present.mean()) / (present.std() + 1e-8) * step_mask


def mean_over_steps(values: Tensor, step_mask: Tensor) -> Tensor:
    """Mean of `values [T, S]` over the steps of each trajectory, `[S]`."""
    return (values * step_mask).sum(0) / step_mask.sum(0).clamp(min=1)


def mean_over_tokens(values: Tensor, action_mask: Tensor) -> Tensor:
    """Mean of `values [..., N]` over the bits that the policy drew, `[...]`."""
    return (values * action_mask).sum(-1) / action_mask.sum(-1).clamp(min=1)


def root_mean_square(values: Tensor) -> Tensor:
    """Of all `values` that are not 0, `[]`."""
    return (values.square().sum() / (values != 0).sum().clamp(min=1)).sqrt()


def is_trained_on(spread: Tensor, min_spread: float, num_mini_batches: int) -> Tensor:
    """
    Which trajectories updates are made with, `bool [S]`: those that can teach something.

    Args:
        spread (`[S]`): how much the score of a question changes from mask to mask.
        min_spread (`float`): below it a trajectory is left out.
        num_mini_batches (`int`): at least so many stay, one for each mini-batch.
    """
    enough = spread >= min_spread
    enough[spread.topk(min(num_mini_batches, len(spread))).indices] = True
    return enough


def bernoulli_kl(logits: Tensor, start_logits: Tensor) -> Tensor:
    """KL(now || start) of each keep bit, in nats, of the shape of both."""
    keep = logits.sigmoid() * (F.logsigmoid(logits) - F.logsigmoid(start_logits))
    prune = (-logits).sigmoid() * (F.logsigmoid(-logits) - F.logsigmoid(-start_logits))
    return keep + prune


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


def clipped_losses(
    logratio: Tensor,
    advantages: Tensor,
    action_mask: Tensor,
    step_mask: Tensor,
    cliprange: float,
    ratio: Literal["joint", "token"],
) -> tuple[Tensor, dict[str, Tensor]]:
    """
    The clipped surrogate of each trajectory (eq. 19): the mean over its steps, and over the bits of a step where each
    is clipped by itself.

    Args:
        logratio (`[T, S, N]`): of each bit, 0 where the policy drew none.
        advantages (`[T, S]`, or `[T, S, N]` with `ratio="token"`): of each step or bit.
        action_mask (`bool [T, S, N]`), step_mask (`bool [T, S]`): what the policy drew.
        ratio (`"joint"` or `"token"`): whether the ratio of all bits of a step is clipped, or that of each bit.

    Returns:
        The losses `[S]`, and metrics by their names in the log.
    """
    if ratio == "joint":
        logratio = logratio.sum(-1)  # (T, S)
        losses, clipped = clipped_policy_loss(logratio, advantages, cliprange)
        approxkl, clipfrac, drawn = 0.5 * logratio.square(), clipped.float(), step_mask
    else:
        if advantages.dim() == 2:
            advantages = advantages[..., None].expand_as(logratio)
        losses, clipped = clipped_policy_loss(logratio, advantages, cliprange)
        losses, clipfrac = mean_over_tokens(losses, action_mask), mean_over_tokens(clipped.float(), action_mask)
        approxkl, drawn = mean_over_tokens(0.5 * logratio.square(), action_mask), action_mask
    metrics = {
        "policy/approxkl_avg": mean_over_steps(approxkl, step_mask).mean(),
        "policy/clipfrac_avg": mean_over_steps(clipfrac, step_mask).mean(),
        "val/ratio": logratio.exp()[drawn].mean(),
    }
    return mean_over_steps(losses, step_mask), metrics


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float
) -> tuple[Tensor, Tensor]:
    """Half the squared error of `values` (eq. 22), not below that of values clipped around those of the rollout."""
    near = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    unclipped, clipped = (values - returns).square(), (near - returns).square()
    return 0.5 * torch.maximum(unclipped, clipped), clipped > unclipped
