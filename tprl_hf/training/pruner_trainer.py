"""What all our trainers have in common: the frozen LVLM stays outside, directories hold the policy, NaN stops."""

import functools
import os
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl
from transformers.trainer_utils import TrainOutput

from tprl_hf import __version__
from tprl_hf.hub.publishing import changed_settings, publish
from tprl_hf.modeling.budget import Budget
from tprl_hf.modeling.hub_tprl import is_hub_name
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.pruning_policy import PolicyOutput
from tprl_hf.modeling.saved_files import written_whole
from tprl_hf.modeling.token_pruner import PruningInputs

from .answer_batches import SampleEncoder, data_digest, undecoded
from .answer_scores import score_answers
from .policy_config import PolicyTrainingConfig, PrunerTrainingConfig
from .rollouts import policy_on_trajectories
from .whole_checkpoints import (
    AfterSaving,
    NothingLeft,
    StopBeforeAnotherStep,
    checkpoint_to_resume,
    make_room,
    mark_whole,
    num_processes,
    remove_old,
)

STATE_FILE = "pruner_trainer_{rank}.pt"


class TrainedNetworks(nn.Module):
    """Autoencoder and policy of a model, without its LVLM: what an optimizer may see.

    Its weights have the names they have in a checkpoint of the whole model.
    """

    def __init__(self, model: TPRLForConditionalGeneration):
        super().__init__()
        self.autoencoder = model.autoencoder
        self.policy = model.policy


class PolicyNetworks(TrainedNetworks):
    """One pass of the policy over all steps of a batch of trajectories."""

    def forward(self, inputs: PruningInputs, sample_index: Tensor, keep_masks: Tensor) -> PolicyOutput:
        """See [`policy_on_trajectories`]."""
        codes = self.autoencoder.encode(inputs.tokens)
        return policy_on_trajectories(self.policy, codes, inputs, sample_index, keep_masks)


def uncollated(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of a dataset as a batch: they are encoded where they are used."""
    return rows


class StopAtNaN(TrainerCallback):
    """Stops before a gradient that is not finite reaches the weights."""

    def __init__(self, trainer: "PrunerTrainer"):
        self.trainer = trainer

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for name, parameter in self.trainer.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                self.trainer.stop_at(f"The gradient of {name} is not finite")


class PrunerTrainer(Trainer):
    """
    Base of our trainers.

    Args:
        model ([`TPRLForConditionalGeneration`]): its LVLM is frozen and never handed to the optimizer.
        args: the config of the subclass.
        processing_class: the model's processor; needs a chat template.
        train_dataset (`datasets.Dataset`): rows with `images`, `prompt` and `answer`; with `image_id`, questions about
            one image share its features.
        eval_dataset (`datasets.Dataset`, *optional*): rows of the same form.
        callbacks, optimizers: as in [`~transformers.Trainer`].

    Attributes:
        recipe (`str`, *optional*): the name of the recipe that the run belongs to, for the model's config.
    """

    _tag_names: tuple[str, ...] = ("tprl", "token-pruning")
    _name = "TPRL"
    _paper: ClassVar[dict[str, str]] = {
        "title": "Language-Guided Token Compression with Reinforcement Learning in Large Vision-Language Models",
        "id": "2603.13394",
    }

    args: PrunerTrainingConfig
    control: TrainerControl

    def __init__(
        self,
        model: TPRLForConditionalGeneration,
        args: PrunerTrainingConfig,
        processing_class: Any,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        if args.push_to_hub and not args.save_base_model and not is_hub_name(model.config.base_model_name_or_path):
            raise ValueError(
                f"push_to_hub=True with the base model {model.config.base_model_name_or_path!r}, which others cannot "
                "load: set model.config.base_model_name_or_path to its name on the Hub, or pass save_base_model=True."
            )
        model.lvlm.requires_grad_(False)
        model.eval()
        if not hasattr(model, "hf_device_map"):  # else it is in its places
            model.to(args.device)
        # so that prompts without a `query_mask` are read at inference as in training
        model.read_chat_template(processing_class)
        self.tprl_model = model
        self.encoder = SampleEncoder(model, processing_class, args.feature_cache_mb * 2**20)
        self.metrics: dict[str, list[float]] = defaultdict(list)
        self.last_inputs: Any = None
        self.recipe: str | None = None
        self.being_written: Path | None = None  # a checkpoint that is not marked whole yet
        super().__init__(
            model=self.networks(model, args),
            args=args,
            data_collator=uncollated,
            processing_class=processing_class,
            train_dataset=None if train_dataset is None else undecoded(train_dataset),
            eval_dataset=None if eval_dataset is None else undecoded(eval_dataset),
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(StopAtNaN(self))
        self.add_callback(AfterSaving(self.mark_checkpoint))
        self.add_callback(StopBeforeAnotherStep())

    def networks(self, model: TPRLForConditionalGeneration, args: Any) -> TrainedNetworks:
        """What is trained under the config `args`, with `requires_grad` set accordingly."""
        raise NotImplementedError

    # ---- training ----

    def loss(self, networks: nn.Module, rows: list[dict[str, Any]]) -> Tensor:
        """The loss of a batch, in which every sample weighs the same: so batches may be cut into micro-batches."""
        raise NotImplementedError

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.last_inputs = inputs
        loss = self.loss(model, inputs)
        self.refuse_nan(loss)
        return loss

    def refuse_nan(self, loss: Tensor) -> None:
        """Stops where `loss` is not finite."""
        if not loss.isfinite():
            self.stop_at(f"The loss is {loss.item()}")

    def stop_at(self, what: str) -> None:
        """Saves what the step had to do with, and raises `FloatingPointError`."""
        step = self.state.global_step
        path = Path(self.args.output_dir) / f"nan-step-{step}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"step": step, "inputs": self.last_inputs, "weights": self.model.state_dict()}, path)
        raise FloatingPointError(
            f"{what} at step {step}. The step's data and the weights before it are in {path}; checkpoints before it "
            f"are good. Lower learning_rate={self.args.learning_rate}, or look at the data."
        )

    def note(self, values: Mapping[str, float | Tensor]) -> None:
        """Collects metrics by their names; the next log averages them."""
        for name, value in values.items():
            self.metrics[name].append(value.item() if isinstance(value, Tensor) else value)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if not any(name.startswith("eval_") for name in logs):
            logs = {**logs, **{name: sum(values) / len(values) for name, values in self.metrics.items()}}
            self.metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        return 0  # most of the work is the frozen LVLM's, of which the optimizer's model knows nothing

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        r"""
        As [`~transformers.Trainer.train`]. A resumed run does what an uninterrupted one would have done.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint of a run with the same settings; `True`
                for the newest in `output_dir` that is whole.

        Raises:
            `ValueError`: when there is none to resume from, or a file of it is missing or damaged.
            `OSError`: when a checkpoint could not be written; those before it are as they were.
        """
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args) if resume_from_checkpoint else None
        if checkpoint is not None:
            self.restore(checkpoint)
        else:
            self.begin()
        # transformers would delete old checkpoints before the new one is marked
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.save_total_limit = limit
        try:
            output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys_for_eval)
        except NothingLeft:  # all is restored
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            output = TrainOutput(self.state.global_step, 0.0, {})
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.being_written is None:
                raise
            shutil.rmtree(self.being_written, ignore_errors=True)
            raise OSError(
                f"{self.being_written} could not be written ({error}). Checkpoints before it are as they were: make "
                "room, and resume."
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.finish()
        return output

    def begin(self) -> None:
        """Called before the first step, not when resumed."""

    def finish(self) -> None:
        """Called after the last step."""
        self.tprl_model.eval()

    # ---- directories ----

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights, optimizer, scheduler and random state."""
        return {"metrics": dict(self.metrics)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes what `saved_state` gave."""
        self.metrics.update(state["metrics"])

    def restore(self, checkpoint: Path) -> None:
        """Takes what a whole checkpoint holds besides what transformers reads."""
        written_by = num_processes(checkpoint)
        if written_by != self.args.world_size:
            raise ValueError(
                f"{checkpoint} was written with {written_by} processes, not {self.args.world_size}: start again, or "
                "resume with as many as before."
            )
        path = checkpoint / STATE_FILE.format(rank=self.args.process_index)
        device = self.args.device  # that of a CPU process has an index, which torch.load does not know
        place = "cpu" if device.type == "cpu" else device
        self.load_state(torch.load(path, map_location=place, weights_only=True))

    def mark_checkpoint(self) -> None:
        """Notes that the checkpoint which was just written is whole, and deletes those that it replaces."""
        assert self.being_written is not None
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.args.should_save:
            mark_whole(self.being_written, self.args.world_size)
            remove_old(self.being_written, self.save_total_limit, self.state.best_model_checkpoint)
        self.being_written = None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        r"""
        Saves model and processor where `from_pretrained` finds them.
        """
        directory = output_dir or self.args.output_dir
        if _internal_call:
            self.being_written = Path(directory)
            if self.args.should_save:
                make_room(self.being_written)
            self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self.write_model(directory, None if _internal_call else self.args.save_base_model)
        if _internal_call:
            os.makedirs(directory, exist_ok=True)
            torch.save(self.saved_state(), Path(directory) / STATE_FILE.format(rank=self.args.process_index))
        elif self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def write_model(self, directory: str, save_base_model: bool | None) -> None:
        """Model and processor, as all ways to save them write them."""
        self.tprl_model.save_pretrained(directory, save_base_model=save_base_model)
        with written_whole(Path(directory)) as scratch:
            self.processing_class.save_pretrained(scratch)

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **facts: Any,
    ) -> Any:
        r"""
        Publishes model, processor, code and card, and nothing else of `output_dir`.

        Args:
            commit_message, blocking, token, revision, private: as in [`~transformers.Trainer.push_to_hub`].
            facts: what the card is to say besides the settings: `results`, `latency`, `flops`, see [`publish`].

        Returns:
            `CommitInfo`, or a `Future` of it if not `blocking`.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        token = token if token is not None else self.args.hub_token
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        if self.args.should_save:
            self.write_model(self.args.output_dir, self.args.save_base_model)
        if not self.is_world_process_zero():
            return None
        logs = [
            {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            for entry in self.state.log_history
        ]
        measured = [entry for entry in logs if entry]
        stage = {
            "stage": self._name,
            "settings": changed_settings(self.args),
            "metrics": measured[-1] if measured else {},
        }
        facts = {"stages": [stage], "tags": self._tag_names, **facts}
        facts.update(token=token, revision=revision, private=private, commit_message=commit_message)
        call = functools.partial(publish, self.args.output_dir, self.hub_model_id, **facts)
        return call() if blocking else HfApi(token=token).run_as_future(call)


class PolicyTrainer(PrunerTrainer):
    """
    Base of the trainers of the policy: measures it as it prunes at inference, keeps the best, and notes in the model's
    config how it was trained.

    Args: see [`PrunerTrainer`].
    """

    _stage: ClassVar[str]  # its name in recipes
    trains_values: ClassVar[bool] = False
    args: PolicyTrainingConfig

    def __init__(
        self,
        model: TPRLForConditionalGeneration,
        args: PolicyTrainingConfig,
        processing_class: Any,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        super().__init__(model, args, processing_class, train_dataset, eval_dataset, callbacks, optimizers)
        if args.keep_ratio is not None:
            model.config.keep_ratio = args.keep_ratio
        self.best: dict[str, Any] = {}
        self.last_measured = -1
        self.training_before = model.config.policy_training
        self.digest: str | None = None

    def networks(self, model: TPRLForConditionalGeneration, args: Any) -> TrainedNetworks:
        model.autoencoder.requires_grad_(False)
        model.policy.requires_grad_(True)
        for part in (model.policy.value_mlp, model.policy.value_head):
            part.requires_grad_(self.trains_values)
        return PolicyNetworks(model)

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        r"""
        Prunes `eval_dataset` to each of `eval_keep_ratios` as inference does.

        Returns:
            `dict`: `eval_accuracy@R` and `eval_logprob@R` for each budget R, and their means `eval_accuracy` and
            `eval_logprob`. An answer is correct when greedy decoding gives exactly the reference.
        """
        dataset = self.eval_dataset if eval_dataset is None else undecoded(eval_dataset)
        if dataset is None:
            raise ValueError("Nothing to evaluate on: pass eval_dataset.")
        model, ratios = self.tprl_model, self.args.eval_keep_ratios
        pruner = model.learned_pruner()
        sums = torch.zeros(2, len(ratios), device=self.args.device)
        # Each process takes every so many-th sample.
        mine = range(self.args.process_index, len(dataset), self.args.world_size)
        batch_size = self.args.per_device_eval_batch_size
        for start in range(0, len(mine), batch_size):
            batch = self.encoder([dataset[i] for i in mine[start : start + batch_size]])
            for column, ratio in enumerate(ratios):
                budget = Budget(keep_ratio=ratio, min_keep=model.config.min_keep)
                keep_mask, _ = pruner.choose(batch.inputs, budget)
                scores = score_answers(model, batch, keep_mask, list(range(len(batch))), self.args.score_batch_size)
                sums[0, column] += scores.correct.sum()
                sums[1, column] += scores.logprobs.sum()
        sums = self.accelerator.reduce(sums, "sum") / len(dataset)
        metrics = {f"{metric_key_prefix}_accuracy": 100 * sums[0].mean().item()}
        metrics[f"{metric_key_prefix}_logprob"] = sums[1].mean().item()
        for column, ratio in enumerate(ratios):
            metrics[f"{metric_key_prefix}_accuracy@{ratio:.3f}"] = 100 * sums[0, column].item()
            metrics[f"{metric_key_prefix}_logprob@{ratio:.3f}"] = sums[1, column].item()
        if metric_key_prefix == "eval" and eval_dataset is None:
            self.remember_if_best(metrics)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def remember_if_best(self, metrics: dict[str, float]) -> None:
        self.last_measured = self.state.global_step
        score = metrics[f"eval_{self.args.best_metric}"]
        if self.args.keep_best and score > self.best.get("score", -float("inf")):
            weights = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
            self.best = {"score": score, "step": self.state.global_step, "weights": weights}

    def begin(self) -> None:
        super().begin()
        if self.args.keep_best and self.eval_dataset is not None:
            self.evaluate()

    def finish(self) -> None:
        if self.best and self.last_measured != self.state.global_step:
            self.evaluate()
        if self.best:
            self.model.load_state_dict(self.best["weights"])
            self.state.best_metric, self.state.best_global_step = self.best["score"], self.best["step"]
        self.note_training(self.best["step"] if self.best else self.state.global_step)
        super().finish()

    def note_training(self, num_steps: int) -> None:
        """Notes in the model's config how its policy was trained, of which `num_steps` were here."""
        if num_steps == 0:  # it is still the start
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
        if _internal_call:  # a checkpoint; `finish` noted the end
            self.note_training(self.state.global_step)
        super().save_model(output_dir, _internal_call)

    def saved_state(self) -> dict[str, Any]:
        return {**super().saved_state(), "best": self.best, "last_measured": self.last_measured}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self.best, self.last_measured = state["best"], state["last_measured"]
