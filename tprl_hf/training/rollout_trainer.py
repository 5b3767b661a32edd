"""What PPO, GRPO and counterfactual credit share: which step does what, questions, budgets, scores, resuming."""

import contextlib
import copy
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainerCallback
from transformers.utils import logging

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

from .answer_batches import AnswerBatch
from .answer_scores import score_answers
from .completion_log import completions_of, write_completions
from .policy_trainer import Measure, PolicyTrainer
from .rewards import (
    MaskScores,
    RewardFunction,
    check_rewards,
    generate_completions,
    given_rewards,
    reward_function_scores,
    weighted_sum,
)
from .rollout_config import BudgetedRolloutConfig, RolloutConfig
from .rollouts import Budgets, Rollouts, annealed, draw_budgets
from .trainer_arguments import needs_answers, num_answers
from .unpruned_answers import OWN_ANSWER_SCORES

logger = logging.get_logger(__name__)

MAX_LOGS = 2000  # each checkpoint holds them all


class LogBuffers(TrainerCallback):
    """Logs after each buffer, or where there are very many, after every so many of them."""

    def __init__(self, updates_per_buffer: int):
        self.updates_per_buffer = updates_per_buffer

    def on_train_begin(self, args, state, control, **kwargs):
        num_buffers = -(-state.max_steps // self.updates_per_buffer)
        state.logging_steps = -(-num_buffers // MAX_LOGS) * self.updates_per_buffer


class RolloutTrainer(PolicyTrainer):
    """
    Base of the trainers that learn from rollouts. An algorithm says how a buffer is filled, `collect`, and what an
    update minimises, `trajectory_losses`.

    One optimizer step is one mini-batch of a buffer of rollouts. What a step does follows from its number alone, so
    that a resumed run equals an uninterrupted one, also in the middle of a buffer.

    Args:
        model, args, processing_class, train_dataset, eval_dataset, callbacks, optimizers: see [`PrunerTrainer`];
            `args` is the config of the algorithm. The policy that `model` comes with is the start.
        reward_funcs (`list`, *optional*): functions `f(prompts, completions, **columns) -> list[float | None]` whose
            sum, weighted by `args.reward_weights`, replaces `args.score`; answers are then generated. Columns are
            those of `train_dataset`. They may be `async`; a rollout of which all say `None` teaches nothing. A name
            is that of a recipe, such as "vqa_score".

    Raises:
        `ValueError`: when two reward functions have one name, or `reward_weights` are not as many as they are.
    """

    has_start: ClassVar[bool] = False  # whether the policy is compared with the one that training started with
    args: RolloutConfig

    def __init__(
        self,
        model: TPRLForConditionalGeneration | str | os.PathLike,
        args: Any = None,
        *,
        reward_funcs: RewardFunction | str | Sequence[RewardFunction | str] | None = None,
        **arguments: Any,
    ):
        self.reward_funcs = given_rewards(reward_funcs)
        super().__init__(model, args, **arguments)
        self.reward_weights = check_rewards(self.reward_funcs, self.args.reward_weights)
        if self.has_start:
            self.start_policy = copy.deepcopy(self.tprl_model.policy).requires_grad_(False)
        if self.args.logging_steps is None:
            self.add_callback(LogBuffers(self.updates_per_buffer))
        if self.tprl_model.config.policy_budget and not getattr(self.args, "rollout_keep_ratios", None):
            logger.warning(
                "The policy is told its budget (policy_budget), and these rollouts have none: set "
                "rollout_keep_ratios, or it learns what it does without one."
            )
        self.batch: AnswerBatch
        self.rollouts: Rollouts | None = None
        self.num_scored = 0  # keep masks, by this process
        self.llm_passes = 0  # the same by all processes
        self.final_scores: Tensor | None = None  # of the last keep masks of a buffer, [S]; not those of a resumed one
        self.asked: list[int] = []  # the rows of the buffer's questions
        # of unpruned prompts, by row: answers where reward functions score them, else scores
        self.unpruned: dict[int, Any] = {}
        self.buffer: dict[str, Tensor] = {}  # by name [T, S, ...], and `is_trained_on [S]`; without it all are

    def accepted(self, dataset: Dataset | None) -> Dataset | None:
        dataset = super().accepted(dataset)
        if not self.reward_funcs and self.args.score not in OWN_ANSWER_SCORES:
            needs_answers(dataset, "train_dataset", "score by it, or pass reward_funcs, or set score='agreement'")
        return dataset

    def begin(self) -> None:
        self.num_scored = self.llm_passes = 0
        if self.has_start:
            self.start_policy.load_state_dict(self.tprl_model.policy.state_dict())
        self.unpruned = {}  # whose rows are those of `train_dataset`, which may be another one by now
        super().begin()

    # ---- the algorithm ----

    def collect(self, buffer: int) -> None:
        """Fills `self.batch`, `self.rollouts` and `self.buffer`."""
        raise NotImplementedError

    def trajectory_losses(self, networks: nn.Module, index: Tensor) -> Tensor:
        """The loss of each of the trajectories `index` of the buffer, `[S]`."""
        raise NotImplementedError

    # ---- which step does what ----

    @property
    def updates_per_buffer(self) -> int:
        return self.args.updates_per_buffer

    @property
    def buffers_per_epoch(self) -> int:
        assert self.train_dataset is not None
        return max(len(self.train_dataset) // (self.args.per_device_train_batch_size * self.args.world_size), 1)

    def has_ended(self) -> bool:
        is_spent = self.llm_passes >= (self.args.max_llm_passes or torch.inf)
        return is_spent and self.state.global_step % self.updates_per_buffer == 0

    def get_train_dataloader(self) -> DataLoader:
        """As many empty batches as an epoch has optimizer steps: buffers choose their questions themselves."""
        if self.train_dataset is None:
            raise ValueError(f"{type(self).__name__} has no train_dataset: pass it rows with images, prompt, answer.")
        ticks = range(self.buffers_per_epoch * self.updates_per_buffer * self.args.world_size)
        return self.accelerator.prepare(DataLoader(ticks, batch_size=1, collate_fn=list))  # type: ignore[arg-type]

    def generator(self, *numbers: int, device: torch.device | str = "cpu") -> torch.Generator:
        """A random stream that follows from the seed, the process and `numbers`."""
        seed = 0
        for number in (self.args.seed, *numbers):
            seed = (seed * 1_000_003 + number + 1) % 2**63
        return torch.Generator(device=device).manual_seed(seed)

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        model.train()
        buffer, update = divmod(self.state.global_step, self.updates_per_buffer)
        if update == 0 or self.rollouts is None:
            self.collect(buffer)
            scored = torch.tensor(self.num_scored, device=self.args.device)
            self.llm_passes = int(self.accelerator.reduce(scored))
        if update == self.updates_per_buffer - 1 and self.llm_passes >= (self.args.max_llm_passes or torch.inf):
            self.control.should_training_stop = True
        assert self.rollouts is not None
        epoch, part = divmod(update, self.args.num_mini_batches)
        chosen = torch.arange(len(self.rollouts.sample_index), device=self.args.device)
        if "is_trained_on" in self.buffer:
            chosen = chosen[self.buffer["is_trained_on"]]
        generator = self.generator(1, buffer, epoch, self.args.process_index)
        order = chosen[torch.randperm(len(chosen), generator=generator).to(self.args.device)]
        mini_batch = order.tensor_split(self.args.num_mini_batches)[part]

        loss = torch.zeros((), device=self.args.device)
        parts = mini_batch.split(self.args.micro_batch_size or len(mini_batch))
        for number, index in enumerate(parts):
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                with self.metrics.of_part(len(index) / len(mini_batch), last):
                    part_loss = self.trajectory_losses(model, index).sum() / len(mini_batch)
                self.last_inputs = {"buffer": buffer, "index": index, "rollouts": self.rollouts.state(), **self.buffer}
                self.refuse_nan(part_loss)
                self.accelerator.backward(part_loss)
            loss += part_loss.detach()
        return loss

    # ---- questions and budgets ----

    def question_indices(self, buffer: int) -> list[int]:
        """Which rows a buffer asks: each epoch goes through the dataset once, in an order of its own."""
        assert self.train_dataset is not None
        epoch, place = divmod(buffer, self.buffers_per_epoch)
        order = torch.randperm(len(self.train_dataset), generator=self.generator(0, epoch))
        count = self.args.per_device_train_batch_size
        start = (place * self.args.world_size + self.args.process_index) * count
        return [int(order[i % len(order)]) for i in range(start, start + count)]

    def questions(self, buffer: int) -> list[dict[str, Any]]:
        """The rows of a buffer."""
        assert self.train_dataset is not None
        return [self.train_dataset[index] for index in self.question_indices(buffer)]

    def budgets(self, buffer: int) -> Budgets:
        """The budgets that a buffer is drawn at: none, but for algorithms that have them."""
        return Budgets()

    def encode_questions(self, buffer: int) -> tuple[AnswerBatch, Budgets]:
        """The questions of a buffer, told their budgets, and these budgets."""
        batch, budgets = self.encoder(self.questions(buffer)), self.budgets(buffer)
        self.asked = self.question_indices(buffer)
        if (buffer + 1) * self.updates_per_buffer < self.state.max_steps:
            self.encoder.prefetch(self.questions(buffer + 1))
        if self.args.score in OWN_ANSWER_SCORES and not self.reward_funcs:
            batch = self.unpruned_answers(batch)
        if budgets.keep_ratio is not None:
            budgets = replace(budgets, keep_ratio=budgets.keep_ratio.to(self.args.device))
        return replace(batch, inputs=replace(batch.inputs, keep_ratio=budgets.keep_ratio)), budgets

    # ---- scores ----

    def score_masks(self, batch: AnswerBatch, keep_masks: Tensor, sample_index: list[int]) -> MaskScores:
        """Scores of `keep_masks [M, N]` of samples `sample_index`."""
        args = self.args
        self.num_scored += len(keep_masks)
        if self.reward_funcs:
            return self.score_completions(batch, sample_index, self.complete(batch, keep_masks, sample_index))
        result = score_answers(
            self.tprl_model, batch, keep_masks, sample_index, args.score_batch_size, self.score_batch_tokens
        )
        scores = result.by_name(args.score).clamp(min=args.min_logprob)
        return MaskScores(scores, result.correct, reads_labels=args.score not in OWN_ANSWER_SCORES)

    def score_completions(
        self, batch: AnswerBatch, sample_index: list[int], completions: tuple[list[str], list[list[int]]]
    ) -> MaskScores:
        """What the reward functions give for answers to samples `sample_index`."""
        rewards = reward_function_scores(self.reward_funcs, batch, sample_index, completions, self.state)
        by_function = {name: values.to(self.args.device) for name, values in rewards.items()}
        return MaskScores(weighted_sum(by_function, self.reward_weights), by_function=by_function)

    def of_unpruned(
        self, batch: AnswerBatch, find: Callable[[AnswerBatch, Tensor, list[int]], Sequence[Any]]
    ) -> list[Any]:
        """
        What `find` says of each question of the buffer when nothing is pruned. The LLM is frozen, so each is asked
        once in a training, by whichever process meets it first: these prompts are the longest of all.
        """
        first = {row: sample for sample, row in reversed([*enumerate(self.asked)]) if row not in self.unpruned}
        new = sorted(first.values())  # a small dataset has a question more than once in a buffer
        found = find(batch, batch.inputs.valid[new], new) if new else []
        rows = [self.asked[sample] for sample in new]
        self.unpruned.update(gather_object(list(zip(rows, found, strict=True))))
        return [self.unpruned[row] for row in self.asked]

    def score_with_unpruned(
        self, batch: AnswerBatch, keep_masks: Tensor, sample_index: list[int]
    ) -> tuple[Tensor, MaskScores]:
        """Scores `[B]` of the unpruned prompts, and those of [`score_masks`]."""
        if not self.reward_funcs:
            unpruned = self.of_unpruned(batch, lambda *masks: self.score_masks(*masks).scores.tolist())
            return torch.tensor(unpruned, device=self.args.device), self.score_masks(batch, keep_masks, sample_index)
        answers = self.of_unpruned(batch, self.answers)
        answers += self.answers(batch, keep_masks, sample_index)
        texts, ids = (list(one) for one in zip(*answers, strict=True))
        scored = self.score_completions(batch, [*range(len(batch)), *sample_index], (texts, ids))  # in one call
        return scored.take(slice(len(batch))).scores, scored.take(slice(len(batch), None))

    def answers(self, batch: AnswerBatch, keep_masks: Tensor, sample_index: list[int]) -> list[tuple[str, list[int]]]:
        """Text and ids of each answer with `keep_masks [M, N]` of samples `sample_index`."""
        self.num_scored += len(keep_masks)
        return list(zip(*self.complete(batch, keep_masks, sample_index), strict=True))

    def complete(
        self, batch: AnswerBatch, keep_masks: Tensor, sample_index: list[int]
    ) -> tuple[list[str], list[list[int]]]:
        """Answers with `keep_masks [M, N]` of samples `sample_index`: texts, and ids."""
        return generate_completions(
            self.tprl_model, self.processing_class, batch, keep_masks, sample_index, self.args.max_completion_length,
            self.args.score_batch_size, self.score_batch_tokens,
        )  # fmt: skip

    def measured_by(self, dataset: Dataset) -> Measure:
        if self.reward_funcs:  # those that are not all labelled are measured by them
            return "answers" if num_answers(dataset) == len(dataset) else "rewards"
        return "unpruned answers" if self.args.score in OWN_ANSWER_SCORES else super().measured_by(dataset)

    @property
    def best_metrics(self) -> tuple[str, ...]:
        least = ("kl",) if self.args.score == "kl" and self.args.best_metric == "logprob" else ()
        return (*least, *super().best_metrics)

    def measure_answers(self, batch: AnswerBatch, keep_mask: Tensor, measured_by: Measure) -> dict[str, Tensor]:
        if measured_by != "rewards":
            return super().measure_answers(batch, keep_mask, measured_by)
        trained_with = self.num_scored
        rewards = self.score_masks(batch, keep_mask, list(range(len(batch)))).scores
        self.num_scored = trained_with  # `llm_passes` counts what training costs, not what measuring does
        return {"reward": rewards[~rewards.isnan()]}

    def score_steps(
        self, batch: AnswerBatch, rollouts: Rollouts, every_step: bool = True, with_unpruned: bool = True
    ) -> Tensor:
        """
        Scores before the first step and after each, float32 `[T + 1, S]`; NaN where no reward function said anything.

        Args:
            every_step: else only the last masks are scored, and the steps before have the score of the start, so that
                the last step is given the whole change.
            with_unpruned: else the score of the start is 0. This is enough where the rollouts of one question are
                compared, because it cancels.
        """
        num_steps, num_trajectories = rollouts.step_mask.shape
        masks = rollouts.keep_masks[1:] if every_step else rollouts.keep_masks[-1:]
        masks, samples = masks.flatten(0, 1), rollouts.sample_index.tolist() * len(masks)  # one call for all
        if with_unpruned:
            start, scored = self.score_with_unpruned(batch, masks, samples)
            self.note({"objective/score_unpruned": start.nanmean()})
        else:
            scored = self.score_masks(batch, masks, samples)
            start = scored.scores.new_zeros(len(batch))
        final = scored.take(slice(-num_trajectories, None))
        self.final_scores = final.scores
        self.note(final.metrics())
        pruned = scored.scores.view(-1, num_trajectories)
        return torch.cat([start[rollouts.sample_index].expand(num_steps + 1 - len(pruned), -1), pruned])

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log({**logs, "llm_passes": self.llm_passes}, start_time)
        if self.args.log_completions and "loss" in logs and self.final_scores is not None:
            self.log_completions(self.final_scores)

    @torch.no_grad()
    def log_completions(self, scores: Tensor) -> None:
        """Shows the first `num_completions_to_print` rollouts of the buffer, answered once more."""
        if not self.is_world_process_zero() or self.rollouts is None:
            return
        count = min(self.args.num_completions_to_print or len(scores), len(scores))  # MAPO's replays have none
        masks = self.rollouts.keep_masks[-1, :count]
        samples = self.rollouts.sample_index[:count].tolist()
        answers, _ = self.complete(self.batch, masks, samples)
        shown = completions_of(self.encoder, self.batch, masks, samples, answers, scores[:count])
        write_completions(
            shown,
            self.state.global_step,
            self.args.output_dir,
            self.args.report_to or (),
            self.callback_handler.callbacks,
        )

    # ---- resuming ----

    def saved_state(self) -> dict[str, Any]:
        rollouts = None if self.rollouts is None else self.rollouts.state()
        state = {"rollouts": rollouts, "buffer": self.buffer, "step": self.state.global_step}
        state["max_steps"] = self.state.max_steps
        state.update(num_scored=self.num_scored, llm_passes=self.llm_passes, unpruned=self.unpruned)
        if self.has_start:
            state["start_policy"] = self.start_policy.state_dict()
        return {**super().saved_state(), **state}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.num_scored, self.llm_passes = state.get("num_scored", 0), state.get("llm_passes", 0)
        self.unpruned = state.get("unpruned", {})  # older versions had none
        if self.has_start and "start_policy" in state:  # nor this
            self.start_policy.load_state_dict(state["start_policy"])
        if state["step"] % self.updates_per_buffer != 0:
            self.state.max_steps = state.get("max_steps", self.state.max_steps)  # from which falling budgets follow
            self.batch, _ = self.encode_questions(state["step"] // self.updates_per_buffer)
            self.rollouts, self.buffer = Rollouts(**state["rollouts"]), state["buffer"]


class BudgetedRolloutTrainer(RolloutTrainer):
    """Base of the trainers whose rollouts may be drawn at budgets. Args: see [`RolloutTrainer`]."""

    args: BudgetedRolloutConfig

    def budgets(self, buffer: int) -> Budgets:
        args, generator = self.args, self.generator(3, buffer, self.args.process_index)
        ratios = args.rollout_keep_ratios
        if args.anneal_budgets and ratios:
            num_buffers = max(self.state.max_steps // self.updates_per_buffer, 1)
            ratios = annealed(ratios, buffer / num_buffers)
        return draw_budgets(ratios, args.shared_budget, args.per_device_train_batch_size, generator)
