"""Memory-augmented policy optimisation (Liang et al. 2018, arXiv 1807.02322), adapted to keep masks."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .advantages import (
    discounted_returns,
    fill_with_group_mean,
    group_spread,
    is_trained_on,
    leave_one_out_advantages,
)
from .grpo_trainer import TPRLGRPOTrainer
from .mapo_config import TPRLMAPOConfig
from .rewards import in_existing_steps, step_rewards
from .rollouts import Rollouts, collect_rollouts, joined, logits_of_start, rollouts_of_masks

logger = logging.get_logger(__name__)


class Memory:
    """
    The best trajectories of each question.

    Args:
        size (`int`): trajectories of a question that are kept.

    Attributes:
        kept (`dict`): by question, `returns` (float32 `[M, T]`, the best first) and `keep_masks` (`bool [M, T, n]`
            over its n tokens, after each step).
    """

    def __init__(self, size: int):
        self.size = size
        self.kept: dict[str, dict[str, Tensor]] = {}

    def add(self, key: str, returns: Tensor, keep_masks: Tensor) -> None:
        """Takes in trajectories of one question, `returns [M, T]` and `keep_masks [M, T, n]`; each is kept once."""
        if key in self.kept:
            returns = torch.cat([self.kept[key]["returns"], returns.cpu()])
            keep_masks = torch.cat([self.kept[key]["keep_masks"], keep_masks.cpu()])
        best = returns[:, 0].argsort(descending=True, stable=True).tolist()
        chosen: list[int] = []
        for index in best:
            if len(chosen) < self.size and not any(keep_masks[index].equal(keep_masks[other]) for other in chosen):
                chosen.append(index)
        self.kept[key] = {"returns": returns[chosen].cpu(), "keep_masks": keep_masks[chosen].cpu()}

    def state(self) -> dict[str, Any]:
        """All of it in three tensors and a list: a checkpoint with one tensor a question would take minutes."""
        kept = list(self.kept.values())
        empty = torch.zeros(0, dtype=torch.bool)
        return {
            "keys": list(self.kept),
            "shapes": torch.tensor([one["keep_masks"].shape for one in kept], dtype=torch.int64).view(-1, 3),
            "returns": torch.cat([torch.zeros(0), *(one["returns"].flatten() for one in kept)]),
            "keep_masks": torch.cat([empty, *(one["keep_masks"].flatten() for one in kept)]),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Takes what `state` gave."""
        shapes = state["shapes"]
        returns = state["returns"].cpu().split(shapes[:, :2].prod(1).tolist())
        masks = state["keep_masks"].cpu().split(shapes.prod(1).tolist())
        self.kept = {
            key: {"returns": earned.view(count, steps), "keep_masks": mask.view(count, steps, tokens)}
            for key, (count, steps, tokens), earned, mask in zip(
                state["keys"], shapes.tolist(), returns, masks, strict=True
            )
        }


@dataclass
class Remembered:
    """The memory of a buffer of questions: M trajectories.

    Args:
        rollouts: the trajectories, with log-probabilities of now.
        returns (float32 `[T, M]`): what they earned.
    """

    rollouts: Rollouts
    returns: Tensor


def memory_weights(logprobs: Tensor, sample_index: Tensor, num_samples: int, least: float) -> tuple[Tensor, Tensor]:
    """
    The weight of each question's memory, `max(sum of its trajectories' probabilities, least)`, 0 without a memory.

    Args:
        logprobs (`[M]`): of whole trajectories.
        sample_index (`int64 [M]`): the question that each is of.

    Returns:
        `weights [B]`, and the probabilities `[B]` that the policy gives the memories.
    """
    probability = torch.zeros(num_samples, device=logprobs.device).index_add_(0, sample_index, logprobs.exp())
    present = torch.zeros(num_samples, dtype=torch.bool, device=logprobs.device)
    present[sample_index] = True
    probability = probability.clamp(max=1.0)
    return probability.clamp(min=least) * present, probability


class TPRLMAPOTrainer(TPRLGRPOTrainer):
    """
    Trains the policy by memory-augmented policy optimisation: a question remembers the best keep masks that it has
    seen, and its gradient is a mean over the memory and over new rollouts. The memory costs no pass of the LLM.

    What of the paper's method stands here, and how:

    - the gradient is `w * E[memory] + (1 - w) * E[new rollouts]`, with `w = max(probability of the memory, alpha)`:
      memory weight clipping. An image has hundreds of bits and the probability of any one mask is next to nothing,
      so that `w` is `alpha` nearly always;
    - one trajectory is drawn from a question's memory in proportion to its probability;
    - a new rollout that is in the memory already is left out, as the second mean is over what is outside;
    - only what is better than its group enters the memory, as only programs with a reward did;
    - systematic exploration, which avoids sampling anything twice, is left out: hundreds of bits never repeat;
    - the baseline is the mean return of a question's new rollouts, and updates are clipped as in GRPO, so that the two
      differ in the memory alone.

    With several processes each has a memory of its own.

    Args: see [`TPRLGRPOTrainer`]; `args` is a [`TPRLMAPOConfig`].
    """

    _name = "TPRL MAPO"
    _stage = "mapo"
    args: TPRLMAPOConfig

    def __init__(self, model: TPRLForConditionalGeneration | str | os.PathLike, args: Any = None, **arguments: Any):
        super().__init__(model, args, **arguments)
        self.memory = Memory(self.args.memory_size)
        self.num_replays = 0

    def begin(self) -> None:
        self.memory, self.num_replays = Memory(self.args.memory_size), 0
        super().begin()

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        found = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if not self.num_replays:
            assert self.train_dataset is not None
            logger.warning(
                f"No question that remembers something was asked again, so that {self._name} was leave-one-out: train "
                f"longer, or on fewer questions than {len(self.train_dataset):,}."
            )
        return found

    @torch.no_grad()
    def collect(self, buffer: int) -> None:
        args, model = self.args, self.tprl_model
        self.batch, budgets = self.encode_questions(buffer)
        generator = self.generator(2, buffer, args.process_index, device=args.device)
        fresh = collect_rollouts(
            model.policy, model.autoencoder, self.batch.inputs, args.num_generations, args.num_steps,
            args.lambda_disc, generator, budgets,
        )  # fmt: skip
        scores = self.score_steps(self.batch, fresh, args.score_every_step, args.score_every_step)
        scores[0] = scores[0].nan_to_num()  # cancels in a group, known or not
        is_scored = ~scores.isnan().any(0)  # else no reward function said anything, and nothing is learned
        rewards = step_rewards(scores.nan_to_num(), fresh.num_kept, 1.0, args.efficiency_coef)
        rewards = in_existing_steps(rewards, fresh.step_mask)
        returns = discounted_returns(rewards, fresh.step_mask, gamma=1.0)  # (T, S)
        returns = fill_with_group_mean(returns, is_scored, args.num_generations)

        keys = self.memory_keys(buffer, budgets.keep_ratio)
        weights = torch.ones(len(fresh.sample_index), device=returns.device)
        advantages = leave_one_out_advantages(returns, args.num_generations, is_scored)
        rollouts = fresh
        remembered = self.remember(keys, budgets)
        if remembered is not None:
            logprobs = remembered.rollouts.logprobs.sum((0, 2))
            per_question, probability = memory_weights(
                logprobs, remembered.rollouts.sample_index, len(self.batch), args.memory_weight
            )
            drawn = self.draw(remembered.rollouts, logprobs, generator)
            replays = remembered.rollouts.take(drawn)
            self.num_replays += len(drawn)
            outside = ~self.is_remembered(fresh, remembered.rollouts)
            weights = torch.cat([self.weights_of_new(per_question, outside), per_question[replays.sample_index]]) * (
                (len(fresh.sample_index) + len(drawn)) / len(self.batch)
            )
            baseline = returns.unflatten(1, (-1, args.num_generations)).mean(2)[:, replays.sample_index]
            advantages = torch.cat([advantages, remembered.returns[:, drawn] - baseline], 1)
            rollouts = joined(fresh, replays)
            self.note({"memory/probability": probability.mean(), "memory/return": remembered.returns[0].mean()})
        self.rollouts = rollouts
        step_mask = rollouts.step_mask
        spread = group_spread(returns[:1], args.num_generations, is_scored)[0][rollouts.sample_index]
        trained_on = is_trained_on(spread, args.min_spread, args.num_mini_batches)
        # the clipped loss is linear in positive factors of the advantages
        self.buffer = {"advantages": advantages * weights * step_mask, "is_trained_on": trained_on}
        if args.beta > 0:
            codes = model.autoencoder.encode(self.batch.inputs.tokens)
            self.buffer["start_logits"] = logits_of_start(
                self.start_policy, codes, self.batch.inputs, rollouts, budgets, args.lambda_disc
            )
        self.memorize(keys, fresh, returns, is_scored)
        self.note(
            {
                "objective/reward": rewards.sum(0)[is_scored].mean(),
                "objective/keep_ratio": (fresh.num_kept[-1] / fresh.num_kept[0].clamp(min=1)).mean(),
                "objective/is_trained_on": trained_on.float().mean(),
                "memory/questions": len(self.memory.kept),
            }
        )

    # ---- the memory ----

    def memory_keys(self, buffer: int, keep_ratio: Tensor | None) -> list[str]:
        """What the memory of each question of a buffer is kept under: its row and its budget."""
        rows = self.question_indices(buffer)
        if keep_ratio is None:
            return [str(row) for row in rows]
        return [f"{row} at {ratio:.6f}" for row, ratio in zip(rows, keep_ratio.tolist(), strict=True)]

    def remember(self, keys: list[str], budgets: Any) -> Remembered | None:
        """All that is remembered of the questions of a buffer."""
        found = [(sample, self.memory.kept[key]) for sample, key in enumerate(keys) if key in self.memory.kept]
        if not found:
            return None
        model, valid = self.tprl_model, self.batch.inputs.valid
        index = torch.tensor([sample for sample, kept in found for _ in kept["returns"]], device=valid.device)
        masks = valid[index].repeat(self.args.num_steps + 1, 1, 1)  # (T + 1, M, N), before the first step all
        place = 0
        for sample, kept in found:
            for mask in kept["keep_masks"].to(valid.device):
                masks[1:, place, valid[sample]] = mask
                place += 1
        rollouts = rollouts_of_masks(
            model.policy, model.autoencoder, self.batch.inputs, index, masks, self.args.lambda_disc, budgets
        )
        returns = torch.cat([kept["returns"] for _, kept in found]).T.to(valid.device)
        return Remembered(rollouts, returns)

    def draw(self, remembered: Rollouts, logprobs: Tensor, generator: torch.Generator) -> Tensor:
        """One trajectory of each question's memory, in proportion to its probability, `int64 [R]`."""
        # the largest of logprob + Gumbel noise falls on each with its probability
        uniform = torch.rand(len(logprobs), generator=generator, device=logprobs.device).clamp(min=1e-20)
        noisy = logprobs - (-uniform.log()).log()
        samples = remembered.sample_index
        return torch.stack(
            [torch.where(samples == sample, noisy, -torch.inf).argmax() for sample in samples.unique().tolist()]
        )

    def is_remembered(self, fresh: Rollouts, remembered: Rollouts) -> Tensor:
        """Which new trajectories are in the memory of their question, `bool [S]`."""
        same = (fresh.keep_masks[:, :, None] == remembered.keep_masks[:, None]).all(-1).all(0)  # (S, M)
        return (same & (fresh.sample_index[:, None] == remembered.sample_index)).any(1)

    def weights_of_new(self, per_question: Tensor, outside: Tensor) -> Tensor:
        """The weights of new trajectories `[S]`: those of a question that are not in its memory share the rest."""
        groups = outside.unflatten(0, (-1, self.args.num_generations)).float()
        share = (1 - per_question)[:, None] / groups.sum(1, keepdim=True).clamp(min=1)
        return (groups * share).flatten()

    def memorize(self, keys: list[str], fresh: Rollouts, returns: Tensor, is_scored: Tensor) -> None:
        """Takes in what is better than the mean of its group."""
        valid = self.batch.inputs.valid
        total = returns[0].unflatten(0, (-1, self.args.num_generations))
        better = (total > total.mean(1, keepdim=True)) & is_scored.unflatten(0, (-1, self.args.num_generations))
        masks = fresh.keep_masks[1:].transpose(0, 1).unflatten(0, (-1, self.args.num_generations))  # (B, G, T, N)
        earned = returns.T.unflatten(0, (-1, self.args.num_generations))  # (B, G, T)
        for sample, key in enumerate(keys):
            if better[sample].any():
                chosen = better[sample]
                self.memory.add(key, earned[sample][chosen], masks[sample][chosen][:, :, valid[sample]])

    # ---- resuming ----

    def saved_state(self) -> dict[str, Any]:
        return {**super().saved_state(), "memory": self.memory.state(), "num_replays": self.num_replays}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.memory.load(state["memory"])
        self.num_replays = state.get("num_replays", 0)  # older versions had none
