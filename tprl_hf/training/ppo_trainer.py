"""Stage 4, as the TPRL paper has it: proximal policy optimisation (eq. 2-6, 14, 19-24)."""

from typing import Any

import torch
from torch import Tensor, nn

from .advantages import clipped_losses, clipped_value_loss, generalized_advantages, mean_over_steps, whiten
from .ppo_config import TPRLPPOConfig
from .rewards import in_existing_steps, step_rewards
from .rollout_trainer import RolloutTrainer
from .rollouts import collect_rollouts, mean_entropy, replayed_logprobs


class TPRLPPOTrainer(RolloutTrainer):
    """
    Trains the policy by proximal policy optimisation: trajectories of some steps, a reward for each step, advantages
    by the value head, and a clipped update. How we read the paper is in docs/method.md.

    Args: see [`RolloutTrainer`]; `args` is a [`TPRLPPOConfig`].

    Example:

    ```python
    >>> def short_answer(prompts, completions, answer, **columns):
    ...     return [float(completion == correct) for completion, correct in zip(completions, answer)]

    >>> trainer = TPRLPPOTrainer(
    ...     model, TPRLPPOConfig("ppo"), train_dataset=train_dataset, reward_funcs=[short_answer]
    ... )
    >>> trainer.train()
    ```
    """

    _name = "TPRL PPO"
    _stage = "ppo"
    trains_values = True
    args: TPRLPPOConfig
    optimizer: torch.optim.Optimizer | None

    @torch.no_grad()
    def collect(self, buffer: int) -> None:
        args, model = self.args, self.tprl_model
        self.batch, _ = self.encode_questions(buffer)
        generator = self.generator(2, buffer, args.process_index, device=args.device)
        # a_t ~ Bernoulli(lambda^t p_t), H_t keeps what a_t keeps of H_{t-1} (eq. 2, 3, 14)
        self.rollouts = rollouts = collect_rollouts(
            model.policy, model.autoencoder, self.batch.inputs, args.num_generations, args.num_steps,
            args.lambda_disc, generator,
        )  # fmt: skip
        step_mask, num_kept = rollouts.step_mask, rollouts.num_kept

        # r_t = alpha (Score(H_t) - Score(H_{t-1})) + beta (1 - K_t / K_{t-1}) (eq. 4-6)
        scores = self.score_steps(self.batch, rollouts, args.score_every_step)
        is_scored = ~scores.isnan().any(0)  # else no reward function said anything, and nothing is learned
        rewards = step_rewards(scores.nan_to_num(), num_kept, args.alpha, args.beta)
        rewards = in_existing_steps(rewards, step_mask)
        # A_t = sum_k (gamma lam)^k delta_{t+k}, and what V is to be, A_t + V_t (eq. 20, 21)
        advantages, returns = generalized_advantages(rewards, rollouts.values, step_mask, args.gamma, args.lam)
        known = step_mask & is_scored
        advantages = whiten(advantages, known) if args.whiten_advantages else advantages * known
        self.buffer = {"advantages": advantages, "returns": torch.where(is_scored, returns, rollouts.values)}

        reward = rewards.sum(0)[is_scored].mean()
        efficiency = step_rewards(torch.zeros_like(scores), num_kept, args.alpha, args.beta).sum(0)[is_scored].mean()
        self.note(
            {
                "objective/reward": reward,
                "objective/reward_score": reward - efficiency,
                "objective/reward_efficiency": efficiency,
                "objective/keep_ratio": (num_kept[-1] / num_kept[0].clamp(min=1)).mean(),
            }
        )
        if known.sum() > 1:
            error = (returns - rollouts.values)[known]
            self.note({"val/explained_variance": 1 - error.var() / (returns[known].var() + 1e-8)})

    def trajectory_losses(self, networks: nn.Module, index: Tensor) -> Tensor:
        args = self.args
        assert self.rollouts is not None
        rollouts = self.rollouts.take(index)
        advantages, returns = self.buffer["advantages"][:, index], self.buffer["returns"][:, index]
        step_mask = rollouts.step_mask
        output = networks(self.batch.inputs, rollouts.sample_index, rollouts.keep_masks[:-1])

        # rho_t = pi(a_t | s_t) / pi_old(a_t | s_t), clipped (eq. 19)
        logratio = replayed_logprobs(rollouts, output.logits, args.lambda_disc) - rollouts.logprobs  # (T, S, N)
        policy_loss, metrics = clipped_losses(
            logratio, advantages, rollouts.action_mask, step_mask, args.cliprange, args.ratio
        )
        # (V_t - R_t)^2 (eq. 22)
        value_losses, value_clipped = clipped_value_loss(output.values, rollouts.values, returns, args.cliprange_value)
        value_loss = mean_over_steps(value_losses, step_mask)
        # entropy, and the sum of all (eq. 23, 24)
        entropy = mean_entropy(rollouts, output.logits, args.lambda_disc)
        loss = policy_loss + args.vf_coef * value_loss - args.entropy_coef * entropy

        self.note(
            {
                **metrics,
                "policy/entropy_avg": entropy.mean(),
                "loss/policy_avg": policy_loss.mean(),
                "loss/value_avg": value_loss.mean(),
                "val/clipfrac_avg": mean_over_steps(value_clipped.float(), step_mask).mean(),
            }
        )
        return loss

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """The value head has a learning rate of its own."""
        if self.optimizer is None:
            optimizer_class, settings = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
            critic = [p for name, p in trained if name.startswith("policy.value_")]
            actor = [p for name, p in trained if not name.startswith("policy.value_")]
            groups = [
                {"params": actor, "weight_decay": self.args.weight_decay},
                {"params": critic, "weight_decay": 0.0, "lr": self.args.critic_learning_rate},
            ]
            self.optimizer = optimizer_class(groups, **settings)
        assert self.optimizer is not None
        return self.optimizer
