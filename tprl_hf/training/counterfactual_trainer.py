"""Counterfactual credit: what each bit of a keep mask earns by itself."""

import torch
from torch import Tensor, nn

from .advantages import (
    bernoulli_kl,
    clipped_losses,
    competing_advantages,
    is_trained_on,
    mean_over_tokens,
    root_mean_square,
)
from .answer_batches import AnswerBatch
from .counterfactual_config import CounterfactualConfig
from .rollout_trainer import BudgetedRolloutTrainer
from .rollouts import (
    Rollouts,
    collect_rollouts,
    logits_at_budget,
    logits_of_start,
    mean_entropy,
)


class CounterfactualTrainer(BudgetedRolloutTrainer):
    """
    Trains a policy that prunes in one step, by the credit of single bits.

    **Derivation.** The policy keeps token i with probability p_i, independently of the others, so the expected reward
    `J = E[R(a)]` is linear in each p_i:

        dJ / dp_i = E[R(a with a_i = 1) - R(a with a_i = 0)]

    One draw of the other bits gives an unbiased estimate of it, the `gain` of keeping token i: score the mask that was
    drawn, flip its bit i, and score it again (as Foerster et al. 2018 and Titsias and Lazaro-Gredilla 2015 do). PPO
    gives one reward to all bits of a mask instead; an answer depends on a few of hundreds, so it is mostly noise.

    Then `sum_i gain_i * (p_i - p_i of the rollout)` has the gradient of J where the policy is still that of the
    rollout. Written as PPO's surrogate, with the ratio `1 + p_i - p_i of the rollout`, it can be clipped: an
    update gains nothing by moving a probability further than `epsilon`.

    - **Flips.** `num_flips` bits of a mask are flipped, drawn by `p_i * (1 - p_i)`; the gain of the others counts as
      0. The logit's gradient has the same factor, so that it counts twice: bits near 0 or 1 move less than the
      gradient of J would move them. It is exact only where all bits are flipped. A mask whose score cannot rise by
      `min_spread` is not flipped: the best answer cannot be improved.
    - **Budget.** At a budget, the logits of a question are shifted so that it keeps as many tokens as it may on
      average. The shift follows from the logits, and its gradient is part of the update
      ([`~tprl_hf.training.rollouts.logits_at_budget`]): one token's gain is another one's loss.
    - **Shared budget.** Where the whole batch shares one, only differences of gains over all its bits matter
      ([`~tprl_hf.training.advantages.competing_advantages`]): questions that gain nothing from their tokens give way.

    Args: see [`RolloutTrainer`]; `args` is a [`CounterfactualConfig`].

    Example:

    ```python
    >>> config = CounterfactualConfig("run")
    >>> trainer = CounterfactualTrainer(model, config, train_dataset=train, eval_dataset=validation)
    >>> trainer.train()
    ```
    """

    _name = "TPRL counterfactual credit"
    has_start = True
    _stage = "counterfactual"
    args: CounterfactualConfig

    @torch.no_grad()
    def collect(self, buffer: int) -> None:
        args, model = self.args, self.tprl_model
        self.batch, budgets = self.encode_questions(buffer)
        generator = self.generator(2, buffer, args.process_index, device=args.device)
        self.rollouts = rollouts = collect_rollouts(
            model.policy, model.autoencoder, self.batch.inputs, args.num_generations, 1, 1.0, generator, budgets
        )
        scored = self.score_masks(self.batch, rollouts.keep_masks[1], rollouts.sample_index.tolist())
        gain = self.gain_of_keeping(self.batch, rollouts, scored.scores, generator)  # (S, N)
        trained_on = is_trained_on(gain.abs().amax(1), args.min_spread, args.num_mini_batches)

        advantages = gain
        if args.weight_by_budget:
            assert budgets.keep_ratio is not None
            advantages = advantages * budgets.keep_ratio[rollouts.sample_index, None]
        if args.scale_advantages:
            advantages = advantages / (root_mean_square(advantages) + 1e-8)
        self.note({"objective/is_trained_on": trained_on.float().mean()})
        if budgets.shared:  # then whoever gains nothing learns too, and the loss is a mean over all
            is_scored = ~scored.scores.isnan()
            advantages = competing_advantages(advantages, rollouts.variances[0] * is_scored[:, None])
            advantages = advantages * (len(trained_on) / trained_on.sum())
            trained_on = torch.ones_like(trained_on)
        self.buffer = {"advantages": advantages[None], "is_trained_on": trained_on}
        if args.beta > 0:
            codes = model.autoencoder.encode(self.batch.inputs.tokens)
            self.buffer["start_logits"] = logits_of_start(
                self.start_policy, codes, self.batch.inputs, rollouts, budgets
            )
        kept = rollouts.num_kept[1] / rollouts.num_kept[0].clamp(min=1)
        reward = self.rewards(self.batch, scored.scores, rollouts.keep_masks[1], rollouts.sample_index)
        self.final_scores = scored.scores
        self.note(scored.metrics())
        self.note({"objective/reward": reward.nanmean(), "objective/keep_ratio": kept.mean()})

    def rewards(self, batch: AnswerBatch, scores: Tensor, keep_masks: Tensor, sample_index: Tensor) -> Tensor:
        """`Score + efficiency_coef * (1 - K / N)` of `keep_masks [M, N]` of samples `sample_index`, `[M]`."""
        kept = keep_masks.sum(1) / batch.inputs.valid[sample_index].sum(1).clamp(min=1)
        return scores + self.args.efficiency_coef * (1 - kept)

    def gain_of_keeping(
        self, batch: AnswerBatch, rollouts: Rollouts, scores: Tensor, generator: torch.Generator
    ) -> Tensor:
        """
        What keeping a token earns more than pruning it, all other bits as they were drawn.

        Args:
            scores (`[S]`): of the keep masks that were drawn.

        Returns:
            float32 `[S, N]`, 0 of bits that were not flipped.
        """
        args, keep_mask, sample_index = self.args, rollouts.keep_masks[1], rollouts.sample_index
        best = torch.inf if self.reward_funcs else float(args.score == "correct")  # scores in nats end at 0
        variance = rollouts.variances[0]
        noise = torch.rand(variance.shape, generator=generator, device=variance.device).log()
        # the largest of log(u) / w are draws without replacement, with weights w
        bits = (noise / variance.clamp(min=1e-12)).topk(min(args.num_flips, variance.shape[1])).indices  # (S, M)
        rows = torch.arange(len(sample_index), device=bits.device)[:, None].expand_as(bits)
        flips = (variance.gather(1, bits) > 1e-6) & (best - scores > args.min_spread)[:, None]
        rows, bits = rows[flips], bits[flips]
        flipped = keep_mask[rows]
        flipped[torch.arange(len(bits), device=bits.device), bits] ^= True

        samples = sample_index[rows]
        after = self.score_masks(batch, flipped, samples.tolist()).scores
        loss = self.rewards(batch, scores, keep_mask, sample_index)[rows]
        loss = loss - self.rewards(batch, after, flipped, samples)  # of flipping the bit
        loss = loss.nan_to_num()  # of answers that no reward function said anything about
        gain = torch.zeros(variance.shape, device=variance.device)
        gain[rows, bits] = torch.where(keep_mask[rows, bits], loss, -loss)
        return gain

    def trajectory_losses(self, networks: nn.Module, index: Tensor) -> Tensor:
        args = self.args
        assert self.rollouts is not None
        rollouts = self.rollouts.take(index)
        action_mask = rollouts.action_mask
        output = networks(self.batch.inputs, rollouts.sample_index, rollouts.keep_masks[:-1])

        logits = logits_at_budget(rollouts, output.logits, lambda_disc=1.0)  # (1, S, N)
        change = logits.sigmoid() - rollouts.keep_probs
        logratio = change.clamp(min=-0.999).log1p()
        loss, metrics = clipped_losses(
            logratio, self.buffer["advantages"][:, index], action_mask, rollouts.step_mask, args.epsilon, "token"
        )
        entropy = mean_entropy(rollouts, logits.detach(), lambda_disc=1.0)
        self.note({**metrics, "policy/entropy_avg": entropy.mean(), "loss/policy_avg": loss.mean()})
        if args.beta > 0:
            kl = bernoulli_kl(logits, self.buffer["start_logits"][:, index])
            kl = mean_over_tokens(kl, action_mask)[0]
            self.note({"objective/kl": kl.mean()})
            loss = loss + args.beta * kl
        return loss
