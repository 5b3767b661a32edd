"""Group-relative policy optimisation of the pruning policy (arXiv 2402.03300)."""

import torch
from torch import Tensor, nn

from .advantages import (
    bernoulli_kl,
    clipped_losses,
    discounted_returns,
    fill_with_group_mean,
    group_advantages,
    group_spread,
    is_trained_on,
    leave_one_out_advantages,
    mean_over_steps,
    mean_over_tokens,
)
from .grpo_config import TPRLGRPOConfig
from .plackett_luce import NOT_DRAWN
from .rewards import in_existing_steps, step_rewards
from .rollout_trainer import BudgetedRolloutTrainer
from .rollouts import (
    Rollouts,
    collect_rollouts,
    logits_at_budget,
    logits_of_start,
    mean_entropy,
    replayed_logprobs,
)


class TPRLGRPOTrainer(BudgetedRolloutTrainer):
    """
    Trains the policy by group-relative policy optimisation: a question is pruned several times, and each rollout is
    compared with the others of its question. No value head is needed; a divergence from the start holds the policy.

    Args: see [`RolloutTrainer`]; `args` is a [`TPRLGRPOConfig`].
    """

    _name = "TPRL GRPO"
    has_start = True
    _stage = "grpo"
    args: TPRLGRPOConfig

    @torch.no_grad()
    def collect(self, buffer: int) -> None:
        args, model = self.args, self.tprl_model
        self.batch, budgets = self.encode_questions(buffer)
        generator = self.generator(2, buffer, args.process_index, device=args.device)
        self.rollouts = rollouts = collect_rollouts(
            model.policy, model.autoencoder, self.batch.inputs, args.num_generations, args.num_steps,
            args.lambda_disc, generator, budgets, args.draw,
        )  # fmt: skip
        step_mask, num_kept = rollouts.step_mask, rollouts.num_kept

        if args.num_probes:
            scores = self.score_probes_first(rollouts)
        else:
            scores = self.score_steps(self.batch, rollouts, args.score_every_step, args.score_every_step)
        scores[0] = scores[0].nan_to_num()  # cancels in a group, known or not
        is_scored = ~scores.isnan().any(0)  # else no reward function said anything, and nothing is learned
        rewards = step_rewards(scores.nan_to_num(), num_kept, 1.0, args.efficiency_coef)
        rewards = in_existing_steps(rewards, step_mask)
        returns = discounted_returns(rewards, step_mask, gamma=1.0)
        returns = fill_with_group_mean(returns, is_scored, args.num_generations)
        compare = group_advantages if args.scale_rewards == "group" else leave_one_out_advantages
        advantages = compare(returns, args.num_generations, is_scored) * step_mask
        spread = group_spread(returns[:1], args.num_generations, is_scored)[0].repeat_interleave(args.num_generations)
        trained_on = is_trained_on(spread, args.min_spread, args.num_mini_batches)
        self.buffer = {"advantages": advantages, "is_trained_on": trained_on}
        if args.beta > 0:
            codes = model.autoencoder.encode(self.batch.inputs.tokens)
            self.buffer["start_logits"] = logits_of_start(
                self.start_policy, codes, self.batch.inputs, rollouts, budgets, args.lambda_disc
            )
        is_known = is_scored.view(-1, args.num_generations).any(1).repeat_interleave(args.num_generations)
        self.note(
            {
                "objective/reward": returns[0][is_known].mean(),
                "objective/keep_ratio": (num_kept[-1] / num_kept[0].clamp(min=1)).mean(),
                "objective/is_trained_on": trained_on.float().mean(),
            }
        )

    def score_probes_first(self, rollouts: Rollouts) -> Tensor:
        """
        Scores as of [`~RolloutTrainer.score_steps`], of the last masks only; NaN where a question was left after
        `num_probes` of its rollouts. What is logged are the means over the probes, which no question lacks.
        """
        args = self.args
        groups = torch.arange(len(rollouts.sample_index), device=args.device).view(-1, args.num_generations)
        probes, others = groups[:, : args.num_probes].flatten(), groups[:, args.num_probes :]
        probed = self.score_steps(self.batch, rollouts.take(probes), every_step=False, with_unpruned=False)
        scores = probed.new_full((len(probed), groups.numel()), torch.nan)
        scores[:, probes] = probed

        is_known = ~probed[-1].isnan()
        filled = fill_with_group_mean(probed[-1:].nan_to_num(), is_known, args.num_probes)
        spread = group_spread(filled, args.num_probes, is_known)[0]
        index = others[spread >= args.min_spread].flatten()
        if len(index) > 0:
            rest = rollouts.take(index)
            found = self.score_masks(self.batch, rest.keep_masks[-1], rest.sample_index.tolist()).scores
            scores[:, index] = torch.cat([found.new_zeros(len(probed) - 1, len(index)), found[None]])
        self.final_scores = scores[-1]
        return scores

    def trajectory_losses(self, networks: nn.Module, index: Tensor) -> Tensor:
        args = self.args
        assert self.rollouts is not None
        rollouts = self.rollouts.take(index)
        action_mask, step_mask = rollouts.action_mask, rollouts.step_mask
        output = networks(self.batch.inputs, rollouts.sample_index, rollouts.keep_masks[:-1])

        logits = logits_at_budget(rollouts, output.logits, args.lambda_disc)
        logratio = replayed_logprobs(rollouts, logits, args.lambda_disc) - rollouts.logprobs  # (T, S, N)
        drawn = action_mask if rollouts.ranks is None else rollouts.ranks != NOT_DRAWN
        loss, metrics = clipped_losses(
            logratio, self.buffer["advantages"][:, index], drawn, step_mask, args.epsilon, args.ratio
        )
        entropy = mean_entropy(rollouts, logits.detach(), args.lambda_disc)
        self.note({**metrics, "policy/entropy_avg": entropy.mean(), "loss/policy_avg": loss.mean()})
        if args.beta > 0:
            kl = bernoulli_kl(logits, self.buffer["start_logits"][:, index])
            kl = mean_over_steps(mean_over_tokens(kl, action_mask), step_mask)
            self.note({"objective/kl": kl.mean()})
            loss = loss + args.beta * kl
        return loss
