"""What all trainers of the policy have in common: measured as it prunes at inference, the best is kept."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers.trainer_utils import PredictionOutput
from transformers.utils import logging

from tprl_hf import __version__
from tprl_hf.data.digest import data_digest
from tprl_hf.modeling.budget import Budget, bounds_of
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.pruning_policy import PolicyOutput
from tprl_hf.modeling.token_pruner import LearnedPruner, PruningInputs

from .answer_batches import AnswerBatch
from .answer_scores import score_answers
from .policy_config import PolicyTrainingConfig
from .pruner_trainer import PrunerTrainer, TrainedNetworks
from .rollouts import policy_on_trajectories
from .trainer_arguments import given_dataset, has_answers, needs_answers
from .unpruned_answers import UnprunedAnswers
from .watched import ChosenTokens, masks_line, question_type_of, watched_numbers, write_watched

logger = logging.get_logger(__name__)

# By what a dataset is measured: its answers, what the LVLM itself answers unpruned, or reward functions.
Measure = Literal["answers", "unpruned answers", "rewards"]
# What is measured in place of these where the reference is the LVLM's own unpruned answer.
OF_OWN_ANSWER = {"accuracy": "agreement", "logprob": "agreement_logprob"}


def rises(metric: str) -> int:
    """1 for metrics that rise when a policy gets better, -1 for those that fall."""
    return -1 if metric == "kl" else 1


def question_effect(pruner: LearnedPruner, inputs: PruningInputs, budget: Budget, keep_mask: Tensor) -> Tensor:
    """Percentage of each sample's kept tokens that the question of another sample would not keep: float32 `[B]`."""
    assert inputs.query is not None and inputs.query_valid is not None
    query, query_valid = inputs.query.roll(1, 0), inputs.query_valid.roll(1, 0)
    others = replace(inputs, query=query, query_valid=query_valid, known_similarity=None)
    other_mask, _ = pruner.choose(others, budget)
    return 100 * (keep_mask & ~other_mask).sum(1) / keep_mask.sum(1).clamp(min=1)


class PolicyNetworks(TrainedNetworks):
    """One pass of the policy over all steps of a batch of trajectories."""

    def __init__(self, model: TPRLForConditionalGeneration):
        super().__init__(model)
        self.known: tuple[Tensor, Tensor] | None = None  # tokens of a buffer, and their codes

    def forward(self, inputs: PruningInputs, sample_index: Tensor, keep_masks: Tensor) -> PolicyOutput:
        """See [`policy_on_trajectories`]."""
        codes = self.codes(inputs.tokens)
        return policy_on_trajectories(self.policy, codes, inputs, sample_index, keep_masks)

    def codes(self, tokens: Tensor) -> Tensor:
        """Codes `[B, N, Z]` of tokens `[B, N, D]`; once for all updates of a buffer, where the encoder is frozen."""
        if any(weight.requires_grad for weight in self.autoencoder.encoder.parameters()):
            return self.autoencoder.encode(tokens)
        if self.known is None or self.known[0] is not tokens:
            self.known = tokens, self.autoencoder.encode(tokens)
        return self.known[1]


class PolicyTrainer(PrunerTrainer):
    """
    Base of the trainers of the policy: measures it as it prunes at inference, keeps the best, and notes in the model's
    config how it was trained.

    Args: see [`PrunerTrainer`].
    """

    trains_values: ClassVar[bool] = False
    args: PolicyTrainingConfig

    def __init__(self, model: TPRLForConditionalGeneration | str | os.PathLike, args: Any = None, **arguments: Any):
        super().__init__(model, args, **arguments)
        args, model = self.args, self.tprl_model
        self.refuse_sets_without_a_mean()
        sets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval_dataset": self.eval_dataset}
        for name, dataset in sets.items():
            if dataset is not None:
                self.refuse_half_labelled(dataset, name)
        self.unpruned_answers = UnprunedAnswers(
            model,
            self.processing_class,
            args.unpruned_answers_dir or os.path.join(args.output_dir, "unpruned_answers"),
            args.max_answer_length,
            batch_size=args.score_batch_size,
            max_tokens=self.score_batch_tokens,
        )
        if args.keep_ratio is not None:
            model.config.keep_ratio = args.keep_ratio  # in place of whatever budget it had
            model.config.num_keep = model.config.threshold = model.config.threshold_keep_ratio = None
        self.best: dict[str, Any] = {}
        self.last_measured = -1
        self.chosen: list[tuple[Dataset, list[ChosenTokens]]] = []  # by the last `evaluate`, of each dataset
        self.watched: list[int] | None = None  # places among these
        self.training_before = model.config.policy_training
        self.pruner_before = None if model.config.pruner is None else model.pruner
        self.digest: str | None = None
        self.is_finished = False

    def train_alone(self, *arguments: Any) -> Any:
        self.is_finished = False
        return super().train_alone(*arguments)

    def networks(self, model: TPRLForConditionalGeneration, args: Any) -> TrainedNetworks:
        model.autoencoder.requires_grad_(False)
        model.policy.requires_grad_(True)
        for part in (model.policy.value_mlp, model.policy.value_head):
            part.requires_grad_(self.trains_values)
        return PolicyNetworks(model)

    def measure(self, dataset: Dataset) -> dict[str, float]:
        r"""
        Prunes a dataset to each of `eval_keep_ratios` as inference does.

        Returns:
            `dict`: `accuracy@R` and `logprob@R` for each budget R, and their means `accuracy` and `logprob`. An answer
            is correct when greedy decoding gives exactly the reference. Without labels the reference is what the LVLM
            itself answers unpruned: `agreement`, `agreement_logprob` and `kl`, in the same way. With reward functions,
            where not every row has an answer, `reward`: the mean of what they say, `None` left out. Besides,
            `question_effect`, the percentage of the kept tokens that the question of another sample of the batch would
            not keep: near 0 the policy does not read the question (see `policy_input_norm` of [`TPRLConfig`]).
        """
        metrics, chosen = self.measure_masks(dataset)
        self.chosen.append((dataset, chosen))
        return metrics

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        self.chosen = []
        if eval_dataset is None:
            self.refuse_sets_without_a_mean()
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def measure_masks(self, dataset: Dataset) -> tuple[dict[str, float], list[ChosenTokens]]:
        """What `measure` gives, and what was chosen of the samples of this process."""
        model, ratios, measured_by = self.tprl_model, self.args.eval_keep_ratios, self.measured_by(dataset)
        self.refuse_half_labelled(dataset, "The dataset")
        pruner = model.learned_pruner()
        totals: dict[str, Tensor] = {}  # of each metric its sum, and how many samples it is known of, [2, R]
        found: list[ChosenTokens] = []
        # Each process takes every so many-th sample.
        mine = range(self.args.process_index, len(dataset), self.args.world_size)
        batch_size = self.args.per_device_eval_batch_size
        reads_questions = batch_size > 1 and not model.config.query_agnostic
        following = [dataset[i] for i in mine[:batch_size]]
        for start in range(0, len(mine), batch_size):
            numbers, batch = mine[start : start + batch_size], self.encoder(following)
            following = [dataset[i] for i in mine[start + batch_size : start + 2 * batch_size]]
            self.encoder.prefetch(following)
            batch = self.unpruned_answers(batch) if measured_by == "unpruned answers" else batch
            chosen, scores = [], []
            for column, ratio in enumerate(ratios):
                budget = Budget(keep_ratio=ratio, **bounds_of(model.config))
                keep_mask, of_tokens = pruner.choose(batch.inputs, budget)
                measured = self.measure_answers(batch, keep_mask, measured_by)
                if reads_questions and len(batch) > 1:  # one alone has no other question
                    measured["question_effect"] = question_effect(pruner, batch.inputs, budget, keep_mask)
                for name, values in measured.items():
                    total = totals.setdefault(name, torch.zeros(2, len(ratios), device=self.args.device))
                    total[0, column] += values.sum()
                    total[1, column] += len(values)
                chosen.append(keep_mask)
                protected = batch.inputs.layout.protected  # of a shared budget they get theirs first
                scores.append(of_tokens.float().masked_fill(protected, torch.inf))
            masks, logits, valid = torch.stack(chosen).cpu(), torch.stack(scores).cpu(), batch.inputs.valid.cpu()
            for sample, (number, row) in enumerate(zip(numbers, batch.rows, strict=True)):
                own = (part[:, sample, valid[sample]].numpy() for part in (masks, logits))
                found.append(ChosenTokens(number, question_type_of(row), *own))
        means: dict[str, dict[str, Tensor]] = {}  # of each metric, by budget; none where nothing is known
        # a process with few rows, or none, has not met all metrics
        for name in dict.fromkeys(gather_object(list(totals))):
            total = totals.get(name, torch.zeros(2, len(ratios), device=self.args.device))
            sums, counts = self.accelerator.reduce(total, "sum")
            columns = zip(ratios, sums, counts.tolist(), strict=True)
            means[name] = {f"{ratio:.3f}": one / count for ratio, one, count in columns if count}
        metrics = {name: torch.stack(list(known.values())).mean().item() for name, known in means.items() if known}
        for key in (f"{ratio:.3f}" for ratio in ratios):
            metrics |= {f"{name}@{key}": known[key].item() for name, known in means.items() if key in known}
        return metrics, found

    def measured_by(self, dataset: Dataset) -> Measure:
        """By what a dataset is measured, all of its rows alike."""
        return "answers" if has_answers(dataset) else "unpruned answers"

    def refuse_half_labelled(self, dataset: Dataset, name: str) -> None:
        """Raises `ValueError` for a dataset that is measured by its answers, and lacks some."""
        if self.measured_by(dataset) == "answers":
            needs_answers(
                dataset, name, "fill them in, or remove the column: the LVLM's own unpruned answers are compared then"
            )

    def refuse_sets_without_a_mean(self) -> None:
        """Raises `ValueError` for evaluation sets that are measured by different things, so that no mean is best."""
        if not self.args.keep_best or not isinstance(self.eval_dataset, Mapping):
            return
        by = {name: self.measured_by(dataset) for name, dataset in self.eval_dataset.items()}
        if len(set(by.values())) > 1:
            raise ValueError(
                "keep_best=True needs one measure for all sets of eval_dataset; "
                f"{', '.join(f'{name!r} has {measure}' for name, measure in by.items())}. "
                "Give all rows an `answer`, or remove the column from all sets, or set keep_best=False."
            )

    def measure_answers(self, batch: AnswerBatch, keep_mask: Tensor, measured_by: Measure) -> dict[str, Tensor]:
        """What is measured of samples, pruned to `keep_mask [B, N]`: by name float32 `[B]`, less what is unknown."""
        everyone, args = list(range(len(batch))), self.args
        scores = score_answers(
            self.tprl_model, batch, keep_mask, everyone, args.score_batch_size, self.score_batch_tokens
        )
        if scores.divergence is not None:
            same = 100 * scores.correct.float()
            return {"agreement": same, "agreement_logprob": scores.logprobs, "kl": scores.divergence}
        return {"accuracy": 100 * scores.correct.float(), "logprob": scores.logprobs}

    @torch.no_grad()
    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        r"""
        Returns:
            `PredictionOutput`: `predictions`, the keep masks at each of R budgets `eval_keep_ratios`, bool `[B, R, N]`
            with False behind the visual tokens of a sample; `metrics` as those of `evaluate`; no `label_ids`.
        """
        dataset = given_dataset(test_dataset, "test_dataset")
        metrics, chosen = self.measure_masks(dataset)
        found = dict(gather_object([(one.number, one.keep_masks) for one in chosen]))
        predictions = np.zeros(
            (len(found), len(self.args.eval_keep_ratios), max(m.shape[1] for m in found.values())), bool
        )
        for number, mask in found.items():
            predictions[number, :, : mask.shape[1]] = mask
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(predictions, None, metrics)

    def measured(self, metrics: dict[str, float]) -> None:
        self.remember_if_best(metrics)
        self.watch()

    def watch(self) -> None:
        """Notes the keep masks of the watched samples of the first dataset that was just measured."""
        # a trainer whose `measure` is another one says nothing of its masks
        if not self.chosen or not self.run_log.is_open or not self.args.watched_samples:
            return
        dataset, chosen = self.chosen[0]
        if self.watched is None:
            self.watched = watched_numbers(chosen, dataset, self.args.watched_samples)
            write_watched(
                self.encoder, [dataset[chosen[place].number] for place in self.watched], self.args.output_dir
            )
        line = masks_line(self.state.global_step, self.args.eval_keep_ratios, chosen, self.watched)
        self.run_log.masks.add(line)

    def remember_if_best(self, metrics: dict[str, float]) -> None:
        self.last_measured = self.state.global_step
        # without labels the LVLM's own answers or the rewards are all that is measured
        name = next((one for one in self.best_metrics if f"eval_{one}" in metrics), None)
        if name is None or not self.args.keep_best:  # no reward function said anything
            return
        score = metrics[f"eval_{name}"]
        if "score" not in self.best or rises(name) * (score - self.best["score"]) > 0:
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {"score": score, "metric": name, "step": self.state.global_step, "weights": weights}

    @property
    def best_metrics(self) -> tuple[str, ...]:
        """By what "best" is told: by the first of these that is measured."""
        return (self.args.best_metric, OF_OWN_ANSWER[self.args.best_metric], "reward")

    def begin(self) -> None:
        super().begin()
        # of an earlier training of this trainer, perhaps with other data
        self.best, self.last_measured, self.watched, self.digest = {}, -1, None, None
        self.training_before = self.tprl_model.config.policy_training
        if self.args.keep_best and self.eval_dataset is not None:
            self.evaluate()

    def finish(self) -> None:
        if self.best and self.last_measured != self.state.global_step:
            self.evaluate()
        if self.best:
            self.model.load_state_dict(self.best["weights"])
            self.state.best_metric, self.state.best_global_step = self.best["score"], self.best["step"]
            self.tell_the_outcome()
        self.note_training(self.best["step"] if self.best else self.state.global_step)
        self.is_finished = True
        super().finish()

    def tell_the_outcome(self) -> None:
        """Says so where the policy ended below its start, with both scores."""
        name = f"eval_{self.best['metric']}"
        measured = [(entry["step"], entry[name]) for entry in self.state.log_history if name in entry]
        (first, start), (last, end) = measured[0], measured[-1]
        if (
            self.is_world_process_zero()
            and last > first == 0
            and rises(name.removeprefix("eval_")) * (end - start) < 0
        ):
            kept = "the start" if self.best["step"] == 0 else f"step {self.best['step']}"
            logger.warning(
                f"{self._name} ended below its start: {name} {start:.5g} at step 0, {end:.5g} at step {last}. The "
                f"model is that of {kept} ({self.best['score']:.5g}). Lower learning_rate={self.args.learning_rate}, "
                "or measure more often with eval_steps."
            )

    def note_training(self, num_steps: int) -> None:
        """Notes in the model's config how its policy was trained, of which `num_steps` were here."""
        if num_steps == 0:  # it is still the start
            self.tprl_model.set_pruner(self.pruner_before)
            self.tprl_model.config.policy_training = self.training_before
            return
        if self.digest is None and self.train_dataset is not None:
            self.digest = data_digest(self.train_dataset)
        self.tprl_model.set_pruner(None)  # from now on the policy chooses
        self.tprl_model.config.policy_training = {
            "stage": self._stage,
            "recipe": self.recipe,
            "data": self.digest,
            "version": __version__,
        }

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if not self.is_finished and self.state.global_step:  # else `finish` noted the end, or nothing was trained
            self.note_training(self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def saved_state(self) -> dict[str, Any]:
        return {**super().saved_state(), "best": self.best, "last_measured": self.last_measured}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.best, self.last_measured = state["best"], state["last_measured"]
