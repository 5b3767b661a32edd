"""Stage 4: the policy learns from what the frozen LVLM makes of its choices (eq. 2-6, 14, 19-24 of the TPRL paper)."""

import contextlib
import copy
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from tprl_hf.modeling.keep_mask import keep_entropy
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .advantages import (
    clipped_policy_loss,
    clipped_value_loss,
    competing_advantages,
    discounted_returns,
    generalized_advantages,
    group_advantages,
    leave_one_out_advantages,
    mean_over_steps,
    mean_over_tokens,
    whiten,
)
from .answer_batches import AnswerBatch
from .answer_scores import score_answers
from .ppo_config import TPRLPPOConfig
from .pruner_trainer import PolicyTrainer
from .rewards import RewardFunction, reward_function_scores, step_rewards
from .rollouts import (
    Rollouts,
    collect_rollouts,
    logits_at_budget,
    policy_on_trajectories,
    replayed_logprobs,
    shift_to_budget,
)


class TPRLPPOTrainer(PolicyTrainer):
    """
    Trains the policy by proximal policy optimisation.

    One optimizer step is one mini-batch of a buffer of rollouts. What a step does follows from its number alone, so
    that a resumed run goes on as if it had never stopped, also in the middle of a buffer.

    Args:
        model, args, processing_class, train_dataset, eval_dataset, callbacks, optimizers: see [`PrunerTrainer`];
            `args` is a [`TPRLPPOConfig`]. The policy that `model` comes with is the start, to which `kl_coef` pulls.
        reward_funcs (`list`, *optional*): functions `f(prompts, completions, **columns) -> list[float]` whose sum
            replaces `args.score`; answers are then generated. Columns are those of `train_dataset`.

    Example:

    ```python
    >>> def short_answer(prompts, completions, answer, **columns):
    ...     return [float(completion == right) for completion, right in zip(completions, answer)]

    >>> trainer = TPRLPPOTrainer(
    ...     model, TPRLPPOConfig("ppo"), processor, train_dataset, eval_dataset, reward_funcs=[short_answer]
    ... )
    >>> trainer.train()
    ```
    """

    _name = "TPRL PPO"
    args: TPRLPPOConfig
    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        model: TPRLForConditionalGeneration,
        args: TPRLPPOConfig,
        *positional,
        reward_funcs: RewardFunction | Sequence[RewardFunction] | None = None,
        **named,
    ):
        super().__init__(model, args, *positional, **named)
        model.config.lambda_disc = args.lambda_disc
        self.reward_funcs = [reward_funcs] if callable(reward_funcs) else list(reward_funcs or [])
        self.start_policy = copy.deepcopy(model.policy).requires_grad_(False)
        self.price = 0.0
        self.batch: AnswerBatch
        self.rollouts: Rollouts | None = None
        self.buffer: dict[str, Tensor] = {}  # advantages, returns [T, S], start_logits [T, S, N], learned_from [S]

    # ---- which step does what ----

    @property
    def updates_per_buffer(self) -> int:
        return self.args.num_ppo_epochs * self.args.num_mini_batches

    @property
    def buffers_per_epoch(self) -> int:
        assert self.train_dataset is not None
        return max(len(self.train_dataset) // (self.args.per_device_train_batch_size * self.args.world_size), 1)

    def get_train_dataloader(self) -> DataLoader:
        """As many empty batches as an epoch has optimizer steps: buffers choose their questions themselves."""
        ticks = range(self.buffers_per_epoch * self.updates_per_buffer * self.args.world_size)
        return self.accelerator.prepare(DataLoader(ticks, batch_size=1, collate_fn=list))  # type: ignore[arg-type]

    def generator(self, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A random stream that follows from the seed, the process and `numbers`."""
        seed = 0
        for number in (self.args.seed, *numbers):
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator(device=device).manual_seed(seed)

    def questions(self, buffer: int) -> list[dict[str, Any]]:
        """The rows of a buffer: each epoch goes through the dataset once, in an order of its own."""
        assert self.train_dataset is not None
        epoch, place = divmod(buffer, self.buffers_per_epoch)
        order = torch.randperm(len(self.train_dataset), generator=self.generator(0, epoch))
        count = self.args.per_device_train_batch_size
        start = (place * self.args.world_size + self.args.process_index) * count
        wanted = [int(order[i % len(order)]) for i in range(start, start + count)]
        return [self.train_dataset[i] for i in wanted]

    def keep_ratios(self, buffer: int) -> tuple[Tensor | None, bool]:
        """The budget of each question of a buffer, `[B]`, where there are any, and whether they share it."""
        args = self.args
        if args.rollout_keep_ratios is None:
            return None, False
        generator = self.generator(3, buffer, args.process_index)
        shared = torch.rand((), generator=generator).item() < args.shared_budget
        count = 1 if shared else args.per_device_train_batch_size
        chosen = torch.randint(len(args.rollout_keep_ratios), (count,), generator=generator)
        ratios = torch.tensor(args.rollout_keep_ratios, device=args.device)[chosen]
        return ratios.expand(args.per_device_train_batch_size), shared

    def encode_questions(self, buffer: int) -> AnswerBatch:
        """The questions of a buffer, with the budgets that the policy is told."""
        batch = self.encoder(self.questions(buffer))
        return replace(batch, inputs=replace(batch.inputs, keep_ratio=self.keep_ratios(buffer)[0]))

    # ---- the algorithm ----

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        buffer, update = divmod(self.state.global_step, self.updates_per_buffer)
        if update == 0 or self.rollouts is None:
            self.collect(buffer)
        assert self.rollouts is not None
        epoch, part = divmod(update, self.args.num_mini_batches)
        learned_from = self.buffer["learned_from"].nonzero()[:, 0]
        generator = self.generator(1, buffer, epoch, self.args.process_index)
        order = learned_from[torch.randperm(len(learned_from), generator=generator).to(self.args.device)]
        mini_batch = order.tensor_split(self.args.num_mini_batches)[part]

        loss = torch.zeros((), device=self.args.device)
        parts = mini_batch.split(self.args.micro_batch_size or len(mini_batch))
        for number, index in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                part_loss = self.ppo_loss(model, index).sum() / len(mini_batch)
                self.last_inputs = {"buffer": buffer, "index": index, "rollouts": self.rollouts.state(), **self.buffer}
                self.refuse_nan(part_loss)
                self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        return loss

    @torch.no_grad()
    def collect(self, buffer: int) -> None:
        """Fills the buffer: rollouts, their scores, rewards and advantages."""
        args, model = self.args, self.tprl_model
        self.batch = batch = self.encode_questions(buffer)
        generator = self.generator(2, buffer, args.process_index, device=args.device)
        self.rollouts = rollouts = collect_rollouts(
            model.policy, model.autoencoder, batch.inputs, args.num_rollouts, args.num_steps,
            args.lambda_disc, generator, *self.keep_ratios(buffer),
        )  # fmt: skip
        exists, num_kept = rollouts.exists, rollouts.num_kept

        scores, right = self.score(batch, rollouts)
        rewards = self.rewards(scores, num_kept, right)
        kept = num_kept[-1] / num_kept[0].clamp(min=1)  # (S,)
        if args.target_keep_ratio is not None:
            excess = self.accelerator.reduce(kept.mean(), "mean").item() / args.target_keep_ratio - 1
            self.price = min(max(self.price + args.price_step * excess, 0.0), args.max_price)
        # A trajectory that ended early earned its last reward in the last step it has.
        last = (exists.sum(0) - 1).clamp(min=0)
        late = (rewards * ~exists).sum(0)
        rewards = (rewards * exists).scatter_add(0, last[None], late[None])

        advantages, returns = generalized_advantages(rewards, rollouts.values, exists, args.gamma, args.lam)
        spread = torch.full_like(kept, torch.inf)
        if args.advantages == "counterfactual":
            returns = rewards
            advantages, spread = self.counterfactual_advantages(batch, rollouts, scores[-1], right[-1], generator)
        elif args.advantages != "gae":
            returns = discounted_returns(rewards, exists, args.gamma)
            of_group = leave_one_out_advantages if args.advantages == "leave_one_out" else group_advantages
            advantages = of_group(returns, args.num_rollouts) * exists
            spread = returns[0].view(-1, args.num_rollouts).std(1).repeat_interleave(args.num_rollouts)
        if args.weight_by_budget:
            assert batch.inputs.keep_ratio is not None
            weights = batch.inputs.keep_ratio[rollouts.of]
            advantages = advantages * (weights[:, None] if advantages.dim() == 3 else weights)
        if args.whiten_advantages:
            size = (advantages.square().sum() / (advantages != 0).sum().clamp(min=1)).sqrt()  # bits not flipped have 0
            advantages = (
                advantages / (size + 1e-8) if args.advantages == "counterfactual" else whiten(advantages, exists)
            )
        learned_from = self.learned_from(spread)
        if args.advantages == "counterfactual" and self.keep_ratios(buffer)[1]:
            # Whoever gains nothing from its tokens gives way to others; the loss is then a mean over all of them.
            probs = rollouts.logprobs.exp()
            advantages = competing_advantages(advantages, probs * (1 - probs) * rollouts.asked)
            advantages = advantages * (len(learned_from) / learned_from.sum())
            learned_from = torch.ones_like(learned_from)
        self.buffer = {"advantages": advantages, "returns": returns, "learned_from": learned_from}
        if args.kl_coef > 0:
            self.buffer["start_logits"] = self.start_logits(batch, rollouts, self.keep_ratios(buffer)[1])

        error = (returns - rollouts.values)[exists]
        self.note(
            objective__score=scores[-1].mean(),
            objective__right=right[-1].float().mean(),
            objective__reward=rewards.sum(0).mean(),
            objective__keep_ratio=kept.mean(),
            objective__price=self.price,
            val__explained_variance=1 - error.var() / (returns[exists].var() + 1e-8),
        )

    def rewards(self, scores: Tensor, num_kept: Tensor, right: Tensor) -> Tensor:
        """Of each step, `[T, S]`, from what is there before the first and after each `[T + 1, S]`."""
        args = self.args
        rewards = step_rewards(scores, num_kept, right, args.alpha, args.beta, args.efficiency_while_right)
        if args.target_keep_ratio is not None:
            rewards[-1] -= self.price * num_kept[-1] / num_kept[0].clamp(min=1) / args.target_keep_ratio
        return rewards

    def counterfactual_advantages(
        self, batch: AnswerBatch, rollouts: Rollouts, scores: Tensor, right: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """
        What keeping a token earns more than pruning it, all other bits as they were drawn.

        Args:
            scores (`[S]`), right (`bool [S]`): of the keep masks that were drawn.

        Returns:
            Advantages `[1, S, N]`, 0 of bits that were not flipped, and each trajectory's largest one in size `[S]`.
        """
        best = torch.inf if self.reward_funcs else float(self.args.score == "correct")  # log-probabilities end at 0
        asked, keep_mask, of = rollouts.asked[0], rollouts.keep_masks[1], rollouts.of
        prob_drawn = rollouts.logprobs[0].exp()
        variance = prob_drawn * (1 - prob_drawn) * asked
        noise = torch.rand(variance.shape, generator=generator, device=variance.device).log()
        # the largest of log(u) / w are draws without replacement, with weights w
        bits = (noise / variance.clamp(min=1e-12)).topk(min(self.args.num_flips, variance.shape[1])).indices  # (S, M)
        rows = torch.arange(len(of), device=bits.device)[:, None].expand_as(bits)
        tested = (variance.gather(1, bits) > 1e-6) & (best - scores > self.args.min_spread)[:, None]
        rows, bits = rows[tested], bits[tested]
        flipped = keep_mask[rows]
        flipped[torch.arange(len(bits), device=bits.device), bits] ^= True

        def reward(scores: Tensor, right: Tensor, keep_masks: Tensor, of: Tensor) -> Tensor:
            start = torch.zeros_like(scores), batch.inputs.valid[of].sum(1), torch.ones_like(right)
            after = scores, keep_masks.sum(1), right
            return self.rewards(*[torch.stack(pair) for pair in zip(start, after, strict=True)])[0]

        gain = reward(scores, right, keep_mask, of)[rows]
        gain = gain - reward(*self.score_masks(batch, flipped, of[rows].tolist()), flipped, of[rows])
        advantages = torch.zeros_like(prob_drawn)
        advantages[rows, bits] = torch.where(keep_mask[rows, bits], gain, -gain)
        return advantages[None], advantages.abs().amax(1)

    def score_masks(self, batch: AnswerBatch, keep_masks: Tensor, of: list[int]) -> tuple[Tensor, Tensor]:
        """Score and rightness `[M]` of `keep_masks [M, N]` of samples `of`."""
        args = self.args
        result = score_answers(self.tprl_model, batch, keep_masks, of, args.score_batch_size)
        if self.reward_funcs:
            scores = reward_function_scores(
                self.reward_funcs, self.tprl_model, self.processing_class, batch, keep_masks, of,
                args.max_new_tokens, args.score_batch_size,
            )  # fmt: skip
        elif args.score == "correct":
            scores = result.right.float()
        else:
            scores = result.logprobs.clamp(min=args.min_logprob)
        return scores, result.right

    def score(self, batch: AnswerBatch, rollouts: Rollouts) -> tuple[Tensor, Tensor]:
        """Scores and rightness of all keep masks: float32 and `bool [T + 1, S]`; of the first where it matters."""
        args = self.args
        num_steps, num_trajectories = rollouts.exists.shape
        of = rollouts.of.tolist()
        after = range(1, num_steps + 1) if args.score_every_step else range(num_steps, num_steps + 1)
        # Between masks of one question the score of its unpruned prompt cancels, and it is the dearest one.
        cancels = args.advantages != "gae" and not (args.score_every_step or args.efficiency_while_right)
        unpruned_samples = [] if cancels else list(range(len(batch)))
        # one forward for all steps; unpruned, each sample is scored once
        masks = torch.cat([batch.inputs.valid[unpruned_samples], *[rollouts.keep_masks[step] for step in after]])
        samples = [*unpruned_samples, *(of * len(after))]
        flat, right = self.score_masks(batch, masks, samples)

        def by_step(values: Tensor) -> Tensor:
            pruned = values[len(unpruned_samples) :].view(len(after), num_trajectories)
            unpruned = torch.zeros_like(pruned[0]) if cancels else values[: len(batch)][rollouts.of]
            between = [unpruned] * (num_steps - len(after))
            return torch.stack([unpruned, *between, *pruned])

        if not cancels:
            self.note(objective__score_unpruned=flat[: len(batch)].mean())
        return by_step(flat), by_step(right)

    def learned_from(self, spread: Tensor) -> Tensor:
        """Trajectories that updates are made with, `bool [S]`; enough for every mini-batch to have one."""
        enough = spread >= self.args.min_spread
        enough[spread.topk(min(self.args.num_mini_batches, len(spread))).indices] = True
        self.note(objective__learned_from=enough.float().mean())
        return enough

    @torch.no_grad()
    def start_logits(self, batch: AnswerBatch, rollouts: Rollouts, shared: bool) -> Tensor:
        """Logits `[T, S, N]` of the policy that training started with; at a budget, shifted to keep as many tokens."""
        codes = self.tprl_model.autoencoder.encode(batch.inputs.tokens)
        before = rollouts.keep_masks[:-1]
        logits = policy_on_trajectories(self.start_policy, codes, batch.inputs, rollouts.of, before).logits
        if self.args.rollout_keep_ratios is None:
            return logits
        probs = rollouts.logprobs.exp()
        probs = torch.where(rollouts.keep_masks[1:], probs, 1 - probs)  # of keeping, whatever was drawn
        targets = (probs * rollouts.asked).sum(-1)  # (T, S)
        shifts = [
            shift_to_budget(logits[step], asked, targets[step], self.args.lambda_disc**step, shared)
            for step, asked in enumerate(rollouts.asked)
        ]
        return logits + torch.stack(shifts)[..., None]

    def ppo_loss(self, networks: nn.Module, index: Tensor) -> Tensor:
        """The loss of each of the trajectories `index` of the buffer, `[S]`."""
        args = self.args
        assert self.rollouts is not None
        rollouts = self.rollouts.take(index)
        buffer = {name: value[:, index] for name, value in self.buffer.items() if name != "learned_from"}
        exists, asked = rollouts.exists, rollouts.asked
        output = networks(self.batch.inputs, rollouts.of, rollouts.keep_masks[:-1])

        logits = logits_at_budget(rollouts, output.logits, args.lambda_disc)
        logratio = replayed_logprobs(rollouts, logits, args.lambda_disc) - rollouts.logprobs  # (T, S, N)
        if args.ratio == "joint":
            logratio = logratio.sum(-1)  # (T, S)
            losses, clipped = clipped_policy_loss(logratio, buffer["advantages"], args.cliprange)
            approxkl, clipfrac = 0.5 * logratio.square(), clipped.float()
        else:
            advantages = buffer["advantages"]
            if args.advantages == "counterfactual":
                old = rollouts.logprobs.exp()
                old = torch.where(rollouts.keep_masks[1:], old, 1 - old)
                logratio = (logits.sigmoid() - old).clamp(min=-0.999).log1p()  # to first order the change itself
            else:
                advantages = advantages[..., None].expand_as(logratio)
            losses, clipped = clipped_policy_loss(logratio, advantages, args.cliprange)
            losses, clipfrac = mean_over_tokens(losses, asked), mean_over_tokens(clipped.float(), asked)
            approxkl = mean_over_tokens(0.5 * logratio.square(), asked)
        policy_loss = mean_over_steps(losses, exists)  # (S,)

        value_losses, value_clipped = clipped_value_loss(
            output.values, rollouts.values, buffer["returns"], args.cliprange_value
        )
        value_loss = mean_over_steps(value_losses, exists)
        entropies = [
            keep_entropy(x, y, args.lambda_disc**t) for t, (x, y) in enumerate(zip(logits, asked, strict=True))
        ]
        entropy = mean_over_steps(mean_over_tokens(torch.stack(entropies), asked), exists)
        loss = policy_loss + args.vf_coef * value_loss - args.entropy_coef * entropy
        if args.kl_coef > 0:
            kl = mean_over_steps(mean_over_tokens(bernoulli_kl(logits, buffer["start_logits"]), asked), exists)
            loss = loss + args.kl_coef * kl
            self.note(objective__kl=kl.mean())

        self.note(
            policy__approxkl_avg=mean_over_steps(approxkl, exists).mean(),
            policy__clipfrac_avg=mean_over_steps(clipfrac, exists).mean(),
            policy__entropy_avg=entropy.mean(),
            loss__policy_avg=policy_loss.mean(),
            loss__value_avg=value_loss.mean(),
            val__clipfrac_avg=mean_over_steps(value_clipped.float(), exists).mean(),
            val__ratio=logratio.exp()[exists if args.ratio == "joint" else asked].mean(),
        )
        return loss

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
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

    # ---- resuming ----

    def saved_state(self) -> dict[str, Any]:
        rollouts = None if self.rollouts is None else self.rollouts.state()
        step = self.state.global_step
        state = {"price": self.price, "rollouts": rollouts, "buffer": self.buffer, "step": step}
        return {**super().saved_state(), **state}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.price = state["price"]
        if state["step"] % self.updates_per_buffer != 0:
            self.batch = self.encode_questions(state["step"] // self.updates_per_buffer)
            self.rollouts, self.buffer = Rollouts(**state["rollouts"]), state["buffer"]


def bernoulli_kl(logits: Tensor, start_logits: Tensor) -> Tensor:
    """KL(now || start) of each keep bit, in nats, of the shape of both."""
    keep = logits.sigmoid() * (F.logsigmoid(logits) - F.logsigmoid(start_logits))
    prune = (-logits).sigmoid() * (F.logsigmoid(-logits) - F.logsigmoid(-start_logits))
    return keep + prune
