"""The reward of a step, beside a reference in float64 that goes through the trajectories one by one."""

import pytest
import torch

from tprl_hf.training.advantages import generalized_advantages
from tprl_hf.training.rewards import in_existing_steps, step_rewards


def ragged(generator, num_steps=4, num_trajectories=60, num_tokens=9):
    """Trajectories some of which end early: keep masks, scores that change with the mask alone, and existing steps."""
    masks = [torch.ones(num_trajectories, num_tokens, dtype=torch.bool)]
    protected = torch.rand(num_trajectories, num_tokens, generator=generator) < 0.1
    for _ in range(num_steps):
        drawn = torch.rand(num_trajectories, num_tokens, generator=generator) < 0.4
        masks.append(masks[-1] & (drawn | protected))
    keep_masks = torch.stack(masks)
    worth = torch.randn(num_tokens, generator=generator, dtype=torch.float64)
    step_mask = (keep_masks[:-1] & ~protected).any(-1)
    return keep_masks.sum(-1), (keep_masks * worth).sum(-1), step_mask


def by_hand(scores, num_kept, step_mask, alpha, beta, gamma, lam, values):
    """Rewards and advantages, a trajectory at a time."""
    num_steps, count = step_mask.shape
    rewards, advantages = (torch.zeros(num_steps, count, dtype=torch.float64) for _ in range(2))
    for s in range(count):
        real = [t for t in range(num_steps) if step_mask[t, s]]
        assert real == list(range(len(real)))  # none follows one that is missing
        for t in real:
            gained = scores[t + 1, s] - scores[t, s]
            rewards[t, s] = alpha * gained + beta * (1 - int(num_kept[t + 1, s]) / int(num_kept[t, s]))
        following, value_after = 0.0, 0.0
        for t in reversed(real):
            delta = rewards[t, s] + gamma * value_after - values[t, s]
            following = delta + gamma * lam * following
            advantages[t, s], value_after = following, values[t, s]
    return rewards, advantages


@pytest.mark.parametrize("seed", range(5))
def test_rewards_and_advantages_of_ragged_trajectories(seed):
    generator = torch.Generator().manual_seed(seed)
    num_kept, scores, step_mask = ragged(generator)
    lengths = step_mask.sum(0)
    assert lengths.min() < 4 and lengths.max() == 4
    values = torch.randn(step_mask.shape, generator=generator, dtype=torch.float64)
    expected, expected_advantages = by_hand(scores, num_kept, step_mask, 1.3, 0.7, 0.99, 0.95, values)
    rewards = in_existing_steps(step_rewards(scores, num_kept, 1.3, 0.7), step_mask)
    torch.testing.assert_close(rewards, expected, atol=1e-12, rtol=1e-12)
    advantages, _ = generalized_advantages(rewards, values, step_mask, 0.99, 0.95)
    torch.testing.assert_close(advantages, expected_advantages, atol=1e-12, rtol=1e-12)
    # the score telescopes: what all steps earn is the difference of the ends
    task = step_rewards(scores, num_kept, 1.0, 0.0).sum(0)
    torch.testing.assert_close(task, scores[-1] - scores[0], atol=1e-12, rtol=1e-12)
