"""Rollouts: the policy prunes a batch of samples step by step, by chance (eq. 2, 3 and 14 of the TPRL paper)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from tprl_hf.modeling.keep_mask import keep_entropy, keep_logprobs, sample_keep_mask
from tprl_hf.modeling.pruning_policy import PolicyOutput, PruningPolicy
from tprl_hf.modeling.token_autoencoder import TokenAutoencoder
from tprl_hf.modeling.token_pruner import PruningInputs, read_similarity

from .advantages import mean_over_steps, mean_over_tokens
from .plackett_luce import NOT_DRAWN, draw_ordered, ordered_logprobs


def take_inputs(inputs: PruningInputs, index: Tensor) -> PruningInputs:
    """
    Inputs of samples `index [S]`, which may repeat, as far as the policy reads them: tokens, which it reads as codes,
    are left out, as they are the largest part. What it reads of them besides, see [`read_similarity`], stays.
    """
    similarity = inputs.known_similarity
    return replace(
        inputs,
        tokens=inputs.tokens[..., :0][index],
        valid=inputs.valid[index],
        num_visual=inputs.num_visual[index.to(inputs.num_visual.device)],
        layout=inputs.layout[index],
        protected=None if inputs.protected is None else inputs.protected[index],
        query=inputs.query[index],
        query_valid=inputs.query_valid[index],
        sample_keys=[inputs.sample_keys[i] for i in index.tolist()],
        keep_ratio=None if inputs.keep_ratio is None else inputs.keep_ratio[index],
        attention=None,
        known_similarity=None if similarity is None else similarity[index],
    )


def policy_on_kept(
    policy: PruningPolicy, codes: Tensor, keep_mask: Tensor, inputs: PruningInputs, step: int
) -> PolicyOutput:
    """
    The policy on the tokens that are left: what it says is what it says on all of them, but late steps cost less.

    Args:
        codes (`[S, N, Z]`), keep_mask (`bool [S, N]`), inputs: of S trajectories at `step`.

    Returns:
        [`PolicyOutput`] with `logits [S, N]`, 0 where a token is gone.
    """
    positions, similarity = inputs.layout.positions(), read_similarity(policy, inputs).known_similarity
    counts = keep_mask.sum(1)
    longest = max(int(counts.max()), 1)
    index = (~keep_mask).long().argsort(dim=1, stable=True)[:, :longest]  # kept tokens first, in their order
    seen = torch.arange(longest, device=index.device) < counts[:, None]

    def left(values: Tensor) -> Tensor:
        return values.gather(1, index[..., None].expand(-1, -1, values.shape[2]))

    output = policy(
        left(codes),
        seen,
        inputs.query,
        inputs.query_valid,
        step,
        left(positions),
        inputs.keep_ratio,
        None if similarity is None else left(similarity),
    )
    logits = torch.zeros_like(keep_mask, dtype=output.logits.dtype)
    return replace(output, logits=logits.scatter(1, index, output.logits.masked_fill(~seen, 0.0)))


def policy_on_trajectories(
    policy: PruningPolicy,
    codes: Tensor,
    inputs: PruningInputs,
    sample_index: Tensor,
    keep_masks: Sequence[Tensor] | Tensor,
) -> PolicyOutput:
    """
    The policy at each step of S trajectories of B samples. All trajectories of a sample begin alike, so that the first
    step, the longest, is computed once for each sample.

    Args:
        codes (`[B, N, Z]`), inputs: of the samples.
        sample_index (`int64 [S]`): the sample that each trajectory is of.
        keep_masks (`bool [T, S, N]`): tokens still kept before each step; at the first, all.

    Returns:
        [`PolicyOutput`] with `logits [T, S, N]` and `values [T, S]`.
    """
    inputs = read_similarity(policy, inputs)
    samples, which = sample_index.unique(return_inverse=True)
    outputs = [policy_on_kept(policy, codes[samples], inputs.valid[samples], take_inputs(inputs, samples), 0)]
    outputs[0] = PolicyOutput(outputs[0].logits[which], outputs[0].values[which])
    for step, mask in enumerate(keep_masks[1:], start=1):
        outputs.append(policy_on_kept(policy, codes[sample_index], mask, take_inputs(inputs, sample_index), step))
    return PolicyOutput(torch.stack([o.logits for o in outputs]), torch.stack([o.values for o in outputs]))


@dataclass
class Rollouts:
    """S trajectories of at most T steps over N tokens.

    Args:
        sample_index (`int64 [S]`): the sample that each trajectory is of.
        keep_masks (`bool [T + 1, S, N]`): tokens left before the first step and after each.
        action_mask (`bool [T, S, N]`): bits that the policy drew; none in steps that a trajectory does not have.
        shifts (float32 `[T, S]`): added to the logits, to draw at a budget; 0 without one.
        targets (float32 `[T, S]`): tokens that a trajectory's own budget lets the policy keep; 0 without one.
        logprobs (float32 `[T, S, N]`): of the bits that were drawn, or of each token of a set when it was drawn.
        values (float32 `[T, S]`): of the states before each step.
        ranks (int64 `[T, S, N]`, *optional*): where sets were drawn and not bits, the order of the draw, see
            [`~tprl_hf.training.plackett_luce.draw_ordered`].
    """

    sample_index: Tensor
    keep_masks: Tensor
    action_mask: Tensor
    shifts: Tensor
    targets: Tensor
    logprobs: Tensor
    values: Tensor
    ranks: Tensor | None = None

    @property
    def step_mask(self) -> Tensor:
        """Steps that a trajectory has, `bool [T, S]`."""
        return self.action_mask.any(-1)

    @property
    def keep_probs(self) -> Tensor:
        """Probability that a bit would be drawn as True, whatever it was drawn as, `[T, S, N]`; not of sets."""
        probs = self.logprobs.exp()
        return torch.where(self.keep_masks[1:], probs, 1 - probs)

    @property
    def variances(self) -> Tensor:
        """`p * (1 - p)` of each bit that was drawn, 0 of all others, `[T, S, N]`."""
        probs = self.logprobs.exp()
        return probs * (1 - probs) * self.action_mask

    @property
    def num_kept(self) -> Tensor:
        """Tokens left before the first step and after each, `int64 [T + 1, S]`."""
        return self.keep_masks.sum(-1)

    def take(self, index: Tensor) -> "Rollouts":
        """Trajectories `index`."""
        own = self.state()
        return Rollouts(
            **{name: value[index] if name == "sample_index" else value[:, index] for name, value in own.items()}
        )

    def state(self) -> dict[str, Tensor]:
        """All fields that there are, by name: what a checkpoint holds of a buffer."""
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


@dataclass
class Budgets:
    """The budgets of a buffer of B questions.

    Args:
        keep_ratio (`[B]`, *optional*): that of each question. `None`: the policy's own probabilities decide.
        shared (`bool`, defaults to `False`): the questions meet it on average only, so that they compete for tokens.
    """

    keep_ratio: Tensor | None = None
    shared: bool = False


def draw_budgets(
    keep_ratios: Sequence[float] | None, shared_budget: float, num_samples: int, generator: torch.Generator
) -> Budgets:
    """
    Draws the budgets of a buffer, on the CPU.

    Args:
        keep_ratios: one of these for each question, or one for all of them where they share it.
        shared_budget (`float`): how often they share it.
    """
    if keep_ratios is None:
        return Budgets()
    shared = torch.rand((), generator=generator).item() < shared_budget
    chosen = torch.randint(len(keep_ratios), (1 if shared else num_samples,), generator=generator)
    return Budgets(torch.tensor(keep_ratios)[chosen].expand(num_samples), shared)


def annealed(keep_ratios: Sequence[float], progress: float) -> list[float]:
    """The smallest of `keep_ratios`: all of them at `progress` 0, one at the end, where it is 1."""
    return sorted(keep_ratios)[: max(1, math.ceil(len(keep_ratios) * (1 - progress)))]


def shift_to_budget(
    logits: Tensor, action_mask: Tensor, targets: Tensor, discount: float = 1.0, shared: bool = False
) -> Tensor:
    """
    What to add to the logits of each row so that `targets` of the tokens in `action_mask` are kept on average.

    Args:
        logits (`[S, N]`), action_mask (`bool [S, N]`), targets (`[S]`): numbers of tokens to keep.
        shared (`bool`, defaults to `False`): the same for all rows, so that they keep the sum of `targets` together.

    Returns:
        float32 `[S]`, in [-40, 40].
    """
    if shared:
        everything = shift_to_budget(logits.reshape(1, -1), action_mask.reshape(1, -1), targets.sum()[None], discount)
        return everything.expand(len(logits))
    low = torch.full_like(targets, -40.0)
    high = torch.full_like(targets, 40.0)
    for _ in range(40):  # bisection: the expected count rises with the shift
        middle = (low + high) / 2
        expected = (discount * (logits + middle[:, None]).sigmoid() * action_mask).sum(1)
        low, high = torch.where(expected < targets, middle, low), torch.where(expected < targets, high, middle)
    return (low + high) / 2


def budget_of_step(
    logits: Tensor,
    valid: Tensor,
    keep_mask: Tensor,
    action_mask: Tensor,
    budgets: Budgets,
    sample_index: Tensor,
    step: int,
    num_steps: int,
    discount: float,
    is_exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """
    What a step's budget adds to `logits [S, N]`, and how many of the tokens in `action_mask` it keeps on average.

    Args:
        valid, keep_mask, action_mask (`bool [S, N]`): tokens at the start, before the step, and in the policy's hands.
        is_exact (`bool`, defaults to `False`): the number is that of a set, and whole.

    Returns:
        `Rollouts.shifts` and `Rollouts.targets` of the step, float32 `[S]` each.
    """
    zero = torch.zeros(len(sample_index), device=logits.device)
    if budgets.keep_ratio is None:
        return zero, zero
    shares = budgets.keep_ratio[sample_index] ** ((step + 1) / num_steps)
    targets = (valid.sum(1) * shares - (keep_mask & ~action_mask).sum(1)).clamp(min=1.0)
    if is_exact:
        targets = torch.minimum(targets.round(), action_mask.sum(1))
    shift = shift_to_budget(logits, action_mask, targets, discount, budgets.shared)
    return shift, zero if budgets.shared else targets


@torch.no_grad()
def collect_rollouts(
    policy: PruningPolicy,
    autoencoder: TokenAutoencoder,
    inputs: PruningInputs,
    num_generations: int,
    num_steps: int,
    lambda_disc: float,
    generator: torch.Generator,
    budgets: Budgets | None = None,
    draw: Literal["bits", "sets"] = "bits",
) -> Rollouts:
    """
    Prunes each of B samples `num_generations` times; the rollouts of a sample lie beside each other.

    Args:
        policy ([`PruningPolicy`]), autoencoder ([`TokenAutoencoder`]): the networks.
        inputs: of B samples.
        lambda_disc (`float`): step t draws from `lambda_disc ** t * p`, t counted from 0 (eq. 14).
        generator (`torch.Generator`): the only source of chance.
        budgets ([`Budgets`], *optional*): draw at these budgets: after step t of T, `keep_ratio ** ((t + 1) / T)` of
            the tokens are left on average.
        draw (`"bits"` or `"sets"`, defaults to `"bits"`): each bit by itself; or, at budgets, a set without
            replacement, so that exactly so many are left.

    Returns:
        [`Rollouts`]
    """
    budgets = budgets or Budgets()
    sample_index = torch.arange(len(inputs.valid), device=inputs.valid.device).repeat_interleave(num_generations)
    codes, inputs = autoencoder.encode(inputs.tokens), read_similarity(policy, inputs)
    rows = take_inputs(inputs, sample_index)
    keep_mask = rows.valid
    keep_masks, action_masks, shifts, all_targets, logprobs, values = [keep_mask], [], [], [], [], []
    all_ranks: list[Tensor] = []
    for step in range(num_steps):
        if step == 0:
            output = policy_on_trajectories(policy, codes, inputs, sample_index, [keep_mask])
            output = PolicyOutput(output.logits[0], output.values[0])
        else:
            output = policy_on_kept(policy, codes[sample_index], keep_mask, rows, step)
        action_mask = keep_mask & ~rows.layout.protected
        discount = lambda_disc**step
        shift, targets = budget_of_step(
            output.logits, rows.valid, keep_mask, action_mask, budgets, sample_index, step, num_steps, discount,
            is_exact=draw == "sets",
        )  # fmt: skip
        logits = output.logits + shift[:, None]
        if draw == "sets":
            ranks = draw_ordered(logits, action_mask, targets, generator)
            drawn = (ranks != NOT_DRAWN) | (keep_mask & ~action_mask)
            logprobs.append(ordered_logprobs(logits, action_mask, ranks))
            all_ranks.append(ranks)
        else:
            drawn = sample_keep_mask(logits, action_mask, discount, generator) | (keep_mask & ~action_mask)
            logprobs.append(keep_logprobs(logits, drawn, action_mask, discount))
        keep_mask = drawn
        keep_masks.append(keep_mask)
        action_masks.append(action_mask)
        shifts.append(shift)
        all_targets.append(targets)
        values.append(output.values)
    return Rollouts(
        sample_index,
        torch.stack(keep_masks),
        torch.stack(action_masks),
        torch.stack(shifts),
        torch.stack(all_targets),
        torch.stack(logprobs),
        torch.stack(values),
        torch.stack(all_ranks) if all_ranks else None,
    )


@torch.no_grad()
def rollouts_of_masks(
    policy: PruningPolicy,
    autoencoder: TokenAutoencoder,
    inputs: PruningInputs,
    sample_index: Tensor,
    keep_masks: Tensor,
    lambda_disc: float,
    budgets: Budgets | None = None,
) -> Rollouts:
    """
    Trajectories that are known already, as if `policy` had drawn them.

    Args:
        policy, autoencoder, inputs, lambda_disc, budgets: see [`collect_rollouts`].
        sample_index (`int64 [S]`), keep_masks (`bool [T + 1, S, N]`): the trajectories.
    """
    budgets = budgets or Budgets()
    codes, num_steps = autoencoder.encode(inputs.tokens), len(keep_masks) - 1
    output = policy_on_trajectories(policy, codes, inputs, sample_index, keep_masks[:-1])
    valid, protected = inputs.valid[sample_index], inputs.layout[sample_index].protected
    action_mask = keep_masks[:-1] & ~protected
    shifts, targets, logprobs = [], [], []
    for step, (logits, before, after, drawn) in enumerate(
        zip(output.logits, keep_masks[:-1], keep_masks[1:], action_mask, strict=True)
    ):
        discount = lambda_disc**step
        shift, target = budget_of_step(logits, valid, before, drawn, budgets, sample_index, step, num_steps, discount)
        shifts.append(shift)
        targets.append(target)
        logprobs.append(keep_logprobs(logits + shift[:, None], after, drawn, discount))
    return Rollouts(
        sample_index,
        keep_masks,
        action_mask,
        torch.stack(shifts),
        torch.stack(targets),
        torch.stack(logprobs),
        output.values,
    )


def joined(first: Rollouts, second: Rollouts) -> Rollouts:
    """The trajectories of both, about the same samples."""
    one, other = first.state(), second.state()
    return Rollouts(**{name: torch.cat([one[name], other[name]], int(name != "sample_index")) for name in one})


def logits_at_budget(rollouts: Rollouts, logits: Tensor, lambda_disc: float) -> Tensor:
    """
    New `logits [T, S, N]`, shifted to each trajectory's own budget again; a shared one keeps the rollout's shift.

    Gradients know that the shift follows the logits: a common offset of a trajectory's logits has none.
    """
    shifted = []
    for step, (now, action_mask) in enumerate(zip(logits, rollouts.action_mask, strict=True)):
        targets, fixed = rollouts.targets[step], now.detach()
        own = targets > 0
        shift = shift_to_budget(fixed, action_mask, targets, lambda_disc**step)
        probs = (fixed + shift[:, None]).sigmoid()
        weights = probs * (1 - probs) * action_mask
        shift = shift - (weights * (now - fixed)).sum(1) / weights.sum(1).clamp(min=1e-6)
        shifted.append(now + torch.where(own, shift, rollouts.shifts[step])[:, None])
    return torch.stack(shifted)


def replayed_logprobs(rollouts: Rollouts, logits: Tensor, lambda_disc: float) -> Tensor:
    """Log-probabilities of what was drawn under `logits [T, S, N]` at budget, with the same discounts, `[T, S, N]`."""
    if rollouts.ranks is not None:
        of_steps = zip(logits, rollouts.action_mask, rollouts.ranks, strict=True)
        return torch.stack([ordered_logprobs(x, action_mask, ranks) for x, action_mask, ranks in of_steps])
    steps = zip(logits, rollouts.keep_masks[1:], rollouts.action_mask, strict=True)
    return torch.stack(
        [keep_logprobs(x, kept, action_mask, lambda_disc**t) for t, (x, kept, action_mask) in enumerate(steps)]
    )


def mean_entropy(rollouts: Rollouts, logits: Tensor, lambda_disc: float) -> Tensor:
    """
    Entropy of each trajectory's bits under `logits [T, S, N]`, mean over bits and steps: nats, `[S]`. Of sets it is
    that of bits at the same budget.
    """
    steps = zip(logits, rollouts.action_mask, strict=True)
    entropies = [keep_entropy(x, action_mask, lambda_disc**t) for t, (x, action_mask) in enumerate(steps)]
    return mean_over_steps(mean_over_tokens(torch.stack(entropies), rollouts.action_mask), rollouts.step_mask)


@torch.no_grad()
def logits_of_start(
    start: PruningPolicy,
    codes: Tensor,
    inputs: PruningInputs,
    rollouts: Rollouts,
    budgets: Budgets,
    lambda_disc: float = 1.0,
) -> Tensor:
    """
    What the policy that training started with says of the states of `rollouts`: logits `[T, S, N]`.

    With budgets they are shifted, so that it would keep as many tokens there as the policy that drew them.

    Args:
        codes (`[B, N, Z]`), inputs: of the samples.
    """
    logits = policy_on_trajectories(start, codes, inputs, rollouts.sample_index, rollouts.keep_masks[:-1]).logits
    if budgets.keep_ratio is None:
        return logits
    targets = rollouts.targets  # (T, S)
    if rollouts.ranks is None:  # also of budgets that questions share
        targets = (rollouts.keep_probs * rollouts.action_mask).sum(-1)
    shifts = [
        shift_to_budget(logits[step], action_mask, targets[step], lambda_disc**step, budgets.shared)
        for step, action_mask in enumerate(rollouts.action_mask)
    ]
    return logits + torch.stack(shifts)[..., None]
