"""Against references that share nothing with the package: plain loops over numbers, in float64."""

import math
import random

import pytest
import torch

from tprl_hf.modeling.keep_mask import keep_entropy, keep_logprobs
from tprl_hf.training import advantages as pure
from tprl_hf.training.advantages import bernoulli_kl
from tprl_hf.training.rewards import in_existing_steps, step_rewards
from tprl_hf.training.rollouts import shift_to_budget

T, S, N = 4, 6, 5
GAMMA, LAM = 0.97, 0.9


@pytest.fixture
def steps():
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(T, S, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = torch.tensor([4, 3, 2, 1, 4, 2])
    step_mask = torch.arange(T)[:, None] < lengths
    return rewards * step_mask, values, step_mask, lengths.tolist()


def test_generalized_advantages(steps):
    rewards, values, step_mask, lengths = steps
    advantages, returns = pure.generalized_advantages(rewards, values, step_mask, GAMMA, LAM)
    for s, length in enumerate(lengths):
        for t in range(T):
            expected = 0.0
            for k in range(t, length):  # the sum of discounted temporal differences, not a recursion
                after = values[k + 1, s].item() if k + 1 < length else 0.0
                delta = rewards[k, s].item() + GAMMA * after - values[k, s].item()
                expected += (GAMMA * LAM) ** (k - t) * delta
            assert advantages[t, s].item() == pytest.approx(expected, abs=1e-12)
            wanted = expected + values[t, s].item() if t < length else 0.0
            assert returns[t, s].item() == pytest.approx(wanted, abs=1e-12)


def ragged_trajectories(count):
    """Scores and tokens left of trajectories that end when nothing is left, some at once, some never."""
    rng = random.Random(5)
    for _ in range(count):
        left = [rng.randrange(0, 40)]
        for _ in range(T):
            left.append(rng.choice([0, left[-1], rng.randint(0, left[-1])]))
        existing = [before > 0 for before in left[:-1]]
        scores = [rng.gauss(0, 1)]
        for step_exists in existing:  # a step that does not exist prunes nothing, so the score stays
            scores.append(rng.gauss(0, 1) if step_exists else scores[-1])
        yield scores, left, existing


def test_step_rewards_of_ragged_trajectories():
    trajectories = list(ragged_trajectories(200))
    _, left, existing = (torch.tensor(columns).T for columns in zip(*trajectories, strict=True))
    scores = torch.tensor([one[0] for one in trajectories], dtype=torch.float64).T
    assert (existing.sum(0) < T).any() and existing.all(0).any() and (existing.sum(0) == 1).any()
    found = step_rewards(scores, left, alpha=0.7, beta=0.3)
    torch.testing.assert_close(in_existing_steps(found, existing), found, atol=1e-12, rtol=0)
    for s, (score, kept, exists) in enumerate(trajectories):
        for t in range(T):
            expected = 0.0
            if exists[t]:
                expected = 0.7 * (score[t + 1] - score[t]) + 0.3 * (kept[t] - kept[t + 1]) / kept[t]
            assert found[t, s].item() == pytest.approx(expected, abs=1e-12)


def test_to_keep_nothing_at_once_earns_one_step():
    at_once, halved = [[100], [0], [0], [0]], [[100], [50], [25], [12]]
    for left, expected in ((at_once, 0.1), (halved, 0.1 * (0.5 + 0.5 + 13 / 25))):
        rewards = step_rewards(torch.zeros(4, 1, dtype=torch.float64), torch.tensor(left), beta=0.1)
        assert rewards.sum().item() == pytest.approx(expected, abs=1e-12)


def test_an_end_that_alone_is_scored_counts_in_the_last_step():
    step_mask = torch.tensor([[True, True], [True, False], [True, False]])
    rewards = torch.tensor([[0.0, 0.0], [0.0, 0.0], [0.6, 0.8]], dtype=torch.float64)
    assert in_existing_steps(rewards, step_mask).tolist() == [[0.0, 0.8], [0.0, 0.0], [0.6, 0.0]]


def test_unknown_returns_become_the_mean_of_their_group():
    returns = torch.tensor([[1.0, 9.0, 3.0, 4.0, 5.0, 6.0]], dtype=torch.float64)
    known = torch.tensor([True, False, True, False, False, False])
    filled = pure.fill_with_group_mean(returns, known, 3)
    assert filled.tolist() == [[1.0, 2.0, 3.0, 0.0, 0.0, 0.0]]
    for compare in (pure.group_advantages, pure.leave_one_out_advantages):
        found = compare(filled, 3, known)
        assert not found[:, ~known].any()
        # as if the known ones had been drawn alone
        torch.testing.assert_close(found[:, :3][:, known[:3]], compare(returns[:, [0, 2]], 2))
        everyone = torch.ones(6, dtype=torch.bool)
        assert torch.equal(compare(returns, 3, everyone), compare(returns, 3))
    assert pure.group_spread(filled, 3, known)[0].tolist() == pytest.approx([math.sqrt(2), 0])


def test_lambda_1_gives_the_discounted_returns(steps):
    rewards, values, step_mask, _ = steps
    _, returns = pure.generalized_advantages(rewards, values, step_mask, GAMMA, 1.0)
    torch.testing.assert_close(returns, pure.discounted_returns(rewards, step_mask, GAMMA))


def test_group_baselines():
    returns = torch.tensor([[1.0, 2.0, 6.0, 5.0, 5.0, 5.0]], dtype=torch.float64)
    out = pure.leave_one_out_advantages(returns, 3)[0].tolist()
    assert out == pytest.approx([1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0])
    grouped = pure.group_advantages(returns, 3, epsilon=0.0)[0, :3]
    deviation = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2)
    assert grouped.tolist() == pytest.approx([-2 / deviation, -1 / deviation, 3 / deviation])
    assert pure.group_advantages(returns, 3)[0, 3:].tolist() == [0, 0, 0]


def test_whitening_looks_at_existing_steps_only(steps):
    rewards, _, step_mask, _ = steps
    white = pure.whiten(rewards + 100, step_mask)
    assert white[step_mask].mean().item() == pytest.approx(0, abs=1e-9)
    assert white[step_mask].std().item() == pytest.approx(1, abs=1e-6)
    assert not white[~step_mask].any()


def test_clipped_policy_loss_and_its_gradient():
    rng = random.Random(0)
    for _ in range(200):
        logratio, advantage = rng.gauss(0, 0.5), rng.gauss(0, 1)
        ratio = math.exp(logratio)
        x = torch.tensor(logratio, dtype=torch.float64, requires_grad=True)
        loss, clipped = pure.clipped_policy_loss(x, torch.tensor(advantage, dtype=torch.float64), 0.2)
        loss.backward()
        too_far = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        limit = 1.2 if ratio > 1.2 else 0.8
        assert loss.item() == pytest.approx(-advantage * (limit if too_far else ratio), abs=1e-12)
        assert bool(clipped) == too_far
        assert x.grad.item() == pytest.approx(0.0 if too_far else -advantage * ratio, abs=1e-12)


def test_clipped_value_loss():
    rng = random.Random(1)
    for _ in range(200):
        value, old, target = (rng.gauss(0, 1) for _ in range(3))
        near = min(max(value, old - 0.2), old + 0.2)
        numbers = [torch.tensor(x, dtype=torch.float64) for x in (value, old, target)]
        loss, _ = pure.clipped_value_loss(*numbers, 0.2)
        assert loss.item() == pytest.approx(max((value - target) ** 2, (near - target) ** 2) / 2, abs=1e-12)


@pytest.mark.parametrize("discount", [1.0, 0.5, 0.25])
def test_logprobs_entropy_and_divergence_of_keep_bits(discount):
    generator = torch.Generator().manual_seed(2)
    logits, start = (3 * torch.randn(S, N, generator=generator, dtype=torch.float64) for _ in range(2))
    bits = torch.rand(S, N, generator=generator) < 0.5
    valid = torch.ones(S, N, dtype=torch.bool)
    logprobs, entropy = keep_logprobs(logits, bits, valid, discount), keep_entropy(logits, valid, discount)
    divergence = bernoulli_kl(logits, start)
    for i in range(S):
        for j in range(N):
            p = discount / (1 + math.exp(-logits[i, j].item()))
            q = 1 / (1 + math.exp(-start[i, j].item()))
            assert logprobs[i, j].item() == pytest.approx(math.log(p if bits[i, j] else 1 - p), abs=1e-9)
            assert entropy[i, j].item() == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), abs=1e-9)
            p = p / discount
            expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
            assert divergence[i, j].item() == pytest.approx(expected, abs=1e-9)


def test_shift_to_budget_meets_the_expected_count():
    generator = torch.Generator().manual_seed(3)
    logits = 4 * torch.randn(S, N, generator=generator)
    action_mask = torch.ones(S, N, dtype=torch.bool)
    action_mask[:, -1] = False
    targets = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 3.9])
    shifts = shift_to_budget(logits, action_mask, targets)
    counts = ((logits + shifts[:, None]).sigmoid() * action_mask).sum(1)
    torch.testing.assert_close(counts, targets, atol=1e-4, rtol=0)
