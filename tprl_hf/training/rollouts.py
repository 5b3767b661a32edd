"""Rollouts: the policy prunes a batch of samples step by step, by chance (eq. 2, 3 and 14 of the TPRL paper)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from tprl_hf.modeling.keep_mask import keep_logprobs, sample_keep_mask
from tprl_hf.modeling.pruning_policy import PolicyOutput, PruningPolicy
from tprl_hf.modeling.token_autoencoder import TokenAutoencoder
from tprl_hf.modeling.token_layout import TokenLayout
from tprl_hf.modeling.token_pruner import PruningInputs


def take_inputs(inputs: PruningInputs, index: Tensor) -> PruningInputs:
    """Inputs of samples `index [S]`, which may repeat."""
    layout = TokenLayout(**{name: value[index] for name, value in vars(inputs.layout).items()})
    return replace(
        inputs,
        tokens=inputs.tokens[index],
        valid=inputs.valid[index],
        layout=layout,
        query=inputs.query[index],
        query_mask=inputs.query_mask[index],
        sample_keys=[inputs.sample_keys[i] for i in index.tolist()],
        keep_ratio=None if inputs.keep_ratio is None else inputs.keep_ratio[index],
        attention=None if inputs.attention is None else inputs.attention[index],
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
    positions = inputs.layout.positions()
    counts = keep_mask.sum(1)
    longest = max(int(counts.max()), 1)
    index = (~keep_mask).long().argsort(dim=1, stable=True)[:, :longest]  # kept tokens first, in their order
    seen = torch.arange(longest, device=index.device) < counts[:, None]
    output = policy(
        codes.gather(1, index[..., None].expand(-1, -1, codes.shape[2])),
        seen,
        inputs.query,
        inputs.query_mask,
        step,
        positions.gather(1, index[..., None].expand(-1, -1, 2)),
        inputs.keep_ratio,
    )
    logits = torch.zeros_like(keep_mask, dtype=output.logits.dtype)
    return replace(output, logits=logits.scatter(1, index, output.logits.masked_fill(~seen, 0.0)))


def policy_on_trajectories(
    policy: PruningPolicy, codes: Tensor, inputs: PruningInputs, of: Tensor, keep_masks: Sequence[Tensor] | Tensor
) -> PolicyOutput:
    """
    The policy at each step of S trajectories of B samples. All trajectories of a sample begin alike, so that the first
    step, the longest, is computed once for each sample.

    Args:
        codes (`[B, N, Z]`), inputs: of the samples.
        of (`int64 [S]`): the sample that each trajectory is of.
        keep_masks (`bool [T, S, N]`): tokens still kept before each step; at the first, all.

    Returns:
        [`PolicyOutput`] with `logits [T, S, N]` and `values [T, S]`.
    """
    samples, which = of.unique(return_inverse=True)
    outputs = [policy_on_kept(policy, codes[samples], inputs.valid[samples], take_inputs(inputs, samples), 0)]
    outputs[0] = PolicyOutput(outputs[0].logits[which], outputs[0].values[which])
    for step, mask in enumerate(keep_masks[1:], start=1):
        outputs.append(policy_on_kept(policy, codes[of], mask, take_inputs(inputs, of), step))
    return PolicyOutput(torch.stack([o.logits for o in outputs]), torch.stack([o.values for o in outputs]))


@dataclass
class Rollouts:
    """S trajectories of at most T steps over N tokens.

    Args:
        of (`int64 [S]`): the sample that each trajectory is of.
        keep_masks (`bool [T + 1, S, N]`): tokens left before the first step and after each.
        asked (`bool [T, S, N]`): bits that the policy drew; none in steps that a trajectory does not have.
        shifts (float32 `[T, S]`): added to the logits, to draw at a budget; 0 without one.
        targets (float32 `[T, S]`): tokens that a trajectory's own budget lets the policy keep; 0 without one.
        logprobs (float32 `[T, S, N]`): of the bits that were drawn.
        values (float32 `[T, S]`): of the states before each step.
    """

    of: Tensor
    keep_masks: Tensor
    asked: Tensor
    shifts: Tensor
    targets: Tensor
    logprobs: Tensor
    values: Tensor

    @property
    def exists(self) -> Tensor:
        """Steps that a trajectory has, `bool [T, S]`."""
        return self.asked.any(-1)

    @property
    def num_kept(self) -> Tensor:
        """Tokens left before the first step and after each, `int64 [T + 1, S]`."""
        return self.keep_masks.sum(-1)

    def take(self, index: Tensor) -> "Rollouts":
        """Trajectories `index`."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rollouts(**{name: value[index] if name == "of" else value[:, index] for name, value in own.items()})

    def state(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}


def shift_to_budget(
    logits: Tensor, asked: Tensor, targets: Tensor, discount: float = 1.0, shared: bool = False
) -> Tensor:
    """
    What to add to the logits of each row so that `targets` of its asked tokens are kept on average.

    Args:
        logits (`[S, N]`), asked (`bool [S, N]`), targets (`[S]`): numbers of tokens to keep.
        shared (`bool`, defaults to `False`): the same for all rows, so that they keep the sum of `targets` together.

    Returns:
        float32 `[S]`, in [-40, 40].
    """
    if shared:
        everything = shift_to_budget(logits.reshape(1, -1), asked.reshape(1, -1), targets.sum()[None], discount)
        return everything.expand(len(logits))
    low = torch.full_like(targets, -40.0)
    high = torch.full_like(targets, 40.0)
    for _ in range(40):  # bisection: the expected count rises with the shift
        middle = (low + high) / 2
        expected = (discount * (logits + middle[:, None]).sigmoid() * asked).sum(1)
        low, high = torch.where(expected < targets, middle, low), torch.where(expected < targets, high, middle)
    return (low + high) / 2


@torch.no_grad()
def collect_rollouts(
    policy: PruningPolicy,
    autoencoder: TokenAutoencoder,
    inputs: PruningInputs,
    num_rollouts: int,
    num_steps: int,
    lambda_disc: float,
    generator: torch.Generator,
    keep_ratios: Tensor | None = None,
    shared_budget: bool = False,
) -> Rollouts:
    """
    Prunes each of B samples `num_rollouts` times; the rollouts of a sample lie beside each other.

    Args:
        policy ([`PruningPolicy`]), autoencoder ([`TokenAutoencoder`]): the networks.
        inputs: of B samples.
        lambda_disc (`float`): step t draws from `lambda_disc ** t * p`, t counted from 0 (eq. 14).
        generator (`torch.Generator`): the only source of chance.
        keep_ratios (`[B]`, *optional*): draw at these budgets: after step t of T, `keep_ratio ** ((t + 1) / T)` of the
            tokens are left on average. Without it the policy's own probabilities decide.
        shared_budget (`bool`, defaults to `False`): meet the budgets on average over the batch, not in each sample.

    Returns:
        [`Rollouts`]
    """
    of = torch.arange(len(inputs.valid), device=inputs.valid.device).repeat_interleave(num_rollouts)
    codes = autoencoder.encode(inputs.tokens)
    rows = take_inputs(inputs, of)
    keep_mask = rows.valid
    keep_masks, all_asked, shifts, all_targets, logprobs, values = [keep_mask], [], [], [], [], []
    for step in range(num_steps):
        if step == 0:
            output = policy_on_trajectories(policy, codes, inputs, of, [keep_mask])
            output = PolicyOutput(output.logits[0], output.values[0])
        else:
            output = policy_on_kept(policy, codes[of], keep_mask, rows, step)
        asked = keep_mask & ~rows.layout.protected
        discount = lambda_disc**step
        shift = targets = torch.zeros(len(of), device=codes.device)
        if keep_ratios is not None:
            shares = keep_ratios[of] ** ((step + 1) / num_steps)
            targets = (rows.valid.sum(1) * shares - (keep_mask & ~asked).sum(1)).clamp(min=1.0)
            shift = shift_to_budget(output.logits, asked, targets, discount, shared_budget)
            targets = torch.zeros_like(targets) if shared_budget else targets
        logits = output.logits + shift[:, None]
        drawn = sample_keep_mask(logits, asked, discount, generator) | (keep_mask & ~asked)
        logprobs.append(keep_logprobs(logits, drawn, asked, discount))
        keep_mask = drawn
        keep_masks.append(keep_mask)
        all_asked.append(asked)
        shifts.append(shift)
        all_targets.append(targets)
        values.append(output.values)
    return Rollouts(
        of,
        torch.stack(keep_masks),
        torch.stack(all_asked),
        torch.stack(shifts),
        torch.stack(all_targets),
        torch.stack(logprobs),
        torch.stack(values),
    )


def logits_at_budget(rollouts: Rollouts, logits: Tensor, lambda_disc: float) -> Tensor:
    """
    New `logits [T, S, N]`, shifted to each trajectory's own budget again; a shared one keeps the rollout's shift.

    Gradients know that the shift follows the logits: a common offset of a trajectory's logits has none.
    """
    shifted = []
    for step, (now, asked) in enumerate(zip(logits, rollouts.asked, strict=True)):
        targets, fixed = rollouts.targets[step], now.detach()
        own = targets > 0
        shift = shift_to_budget(fixed, asked, targets, lambda_disc**step)
        probs = (fixed + shift[:, None]).sigmoid()
        weights = probs * (1 - probs) * asked
        shift = shift - (weights * (now - fixed)).sum(1) / weights.sum(1).clamp(min=1e-6)
        shifted.append(now + torch.where(own, shift, rollouts.shifts[step])[:, None])
    return torch.stack(shifted)


def replayed_logprobs(rollouts: Rollouts, logits: Tensor, lambda_disc: float) -> Tensor:
    """Log-probabilities of the drawn bits under `logits [T, S, N]` at budget, with the same discounts, `[T, S, N]`."""
    steps = zip(logits, rollouts.keep_masks[1:], rollouts.asked, strict=True)
    return torch.stack([keep_logprobs(x, kept, asked, lambda_disc**t) for t, (x, kept, asked) in enumerate(steps)])
