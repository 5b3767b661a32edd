"""What all our trainers have in common: the frozen LVLM stays outside, directories hold the policy, NaN stops."""

import contextlib
import functools
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from huggingface_hub import HfApi
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import get_worker_info
from transformers import Trainer, TrainerCallback, TrainerControl, set_seed
from transformers.trainer_utils import PredictionOutput, TrainOutput

from tprl_hf.hub.publishing import changed_settings, publish, write_card
from tprl_hf.modeling.hub_tprl import is_hub_name
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.saved_files import written_whole

from .answer_batches import AnswerBatch, EncodedSample, SampleEncoder
from .feature_cache import cache_of
from .micro_batches import MAX_TOKENS, MAX_TOKENS_ON_CPU, within_memory
from .policy_config import PrunerTrainingConfig
from .run_log import RunLog, start_facts
from .step_metrics import StepMetrics
from .trainer_arguments import (
    given_args,
    given_dataset,
    given_model,
    given_processor,
    refuse_other_arguments,
    with_pictures,
)
from .trainer_callbacks import AtTheStart, StopAtNaN
from .training_lock import alone_in
from .whole_checkpoints import (
    AfterSaving,
    NothingLeft,
    StopBeforeAnotherStep,
    checkpoint_to_resume,
    could_not_be_written,
    make_room,
    mark_whole,
    new_run,
    num_processes,
    remove_old,
    run_of,
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


@dataclass
class MicroBatch:
    """A part of the rows of a batch.

    Args:
        rows, samples: as they are, and encoded.
        share (`float`): of the rows of the batch.
    """

    rows: list[dict[str, Any]]
    samples: list[EncodedSample]
    share: float

    def __len__(self) -> int:
        return len(self.rows)


class PrunerTrainer(Trainer):
    """
    Base of our trainers.

    Args:
        model ([`TPRLForConditionalGeneration`], `str` or `os.PathLike`): its LVLM is frozen and never handed to the
            optimizer. Of a name or path the checkpoint is loaded; that of a base model gets a new policy.
        args (*optional*): the config of the subclass; by default its defaults, in `MODEL-STAGE`.
        processing_class (*optional*): the model's processor, with a chat template; by default that beside the model or
            its base model.
        train_dataset (`datasets.Dataset`): rows with `images` (or `image`), `prompt` and, where the algorithm reads
            it, `answer`; questions about one image share its features. Rows without a picture are left out.
        eval_dataset (`datasets.Dataset` or a dict of such, *optional*): rows of the same form.
        callbacks, optimizers: as in [`~transformers.Trainer`].

    Raises:
        `TypeError`: for arguments of other kinds, such as a stream of rows; the message says what to pass instead.
        `ValueError`: for datasets that lack a column, a `train_dataset` without a picture, where no processor is
            found, and for a base model with injected adapters, which no checkpoint would bring back.

    Attributes:
        recipe (`str`, *optional*): the name of the recipe that the run belongs to, for the model's config.
    """

    _tag_names: tuple[str, ...] = ("tprl", "token-pruning")
    _name = "TPRL"
    _stage: ClassVar[str]  # its name in recipes
    _paper: ClassVar[dict[str, str]] = {
        "title": "Language-Guided Token Compression with Reinforcement Learning in Large Vision-Language Models",
        "id": "2603.13394",
    }

    args: PrunerTrainingConfig
    control: TrainerControl

    def __init__(
        self,
        model: TPRLForConditionalGeneration | str | os.PathLike,
        args: Any = None,
        *,
        processing_class: Any = None,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | Mapping[str, Dataset] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
        **others: Any,
    ):
        refuse_other_arguments(type(self).__name__, others)
        args = given_args(type(self), args, model, self._stage)
        self.args = args
        train_dataset, eval_dataset = self.accepted(train_dataset), given_dataset(eval_dataset, "eval_dataset")
        if isinstance(model, (str, os.PathLike)):
            set_seed(args.seed)  # of a policy that is new
        model = given_model(model)
        processing_class = given_processor(processing_class, model)
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
        cache = cache_of(
            model, processing_class, args.feature_cache_mb, args.feature_cache_dir, args.feature_cache_dtype
        )
        on_cpu = model.device.type == "cpu"
        self.score_batch_tokens = args.score_batch_tokens or (MAX_TOKENS_ON_CPU if on_cpu else MAX_TOKENS)
        together = args.encode_batch_size or (1 if on_cpu else 32)
        self.encoder = SampleEncoder(
            model, processing_class, cache, encode_batch_size=together, prefetch_threads=args.prefetch_threads
        )
        self.metrics = StepMetrics()
        self.last_inputs: Any = None
        self.recipe: str | None = None
        self.being_written: Path | None = None  # a checkpoint that is not marked whole yet
        self.run = 0  # among those that have checkpoints in `output_dir`
        self.run_log = RunLog(args.output_dir, start_facts(self._stage, args))
        super().__init__(
            model=self.networks(model, args),
            args=args,
            data_collator=self.collate,
            processing_class=processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.add_callback(self.run_log)
        self.add_callback(AtTheStart(self.begin))
        self.add_callback(StopAtNaN(self))
        self.add_callback(AfterSaving(self.mark_checkpoint))
        self.add_callback(StopBeforeAnotherStep(self.has_ended))

    def networks(self, model: TPRLForConditionalGeneration, args: Any) -> TrainedNetworks:
        """What is trained under the config `args`, with `requires_grad` set accordingly."""
        raise NotImplementedError

    def has_ended(self) -> bool:
        """Whether a resumed run has ended before its last step."""
        return False

    # ---- training ----

    @property
    def train_dataset(self) -> Dataset | None:
        """What is trained on; one that is assigned is checked as the constructor's."""
        return self.accepted_dataset

    @train_dataset.setter
    def train_dataset(self, dataset: Dataset | None) -> None:
        self.accepted_dataset = self.accepted(dataset)

    def accepted(self, dataset: Dataset | None) -> Dataset | None:
        """The rows of a dataset that can be trained on. Raises `TypeError` or `ValueError` where it is none."""
        dataset = given_dataset(dataset, "train_dataset")
        return None if dataset is None else with_pictures(dataset, "train_dataset")

    def collate(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of a dataset as a batch; it is drawn one step before it is used, so that images are processed ahead."""
        if get_worker_info() is None:  # the caches are those of this process
            self.encoder.prefetch(rows)
        return rows

    def loss(self, networks: nn.Module, batch: AnswerBatch) -> Tensor:
        """The loss of a batch, in which every sample weighs the same: so batches may be cut into micro-batches."""
        raise NotImplementedError

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        samples = self.encoder.encode_rows(inputs)
        parts = within_memory([sample.num_visual for sample in samples], self.args.micro_batch_tokens)
        loss = torch.zeros((), device=self.args.device)
        for number, part in enumerate(parts):
            rows, encoded = [inputs[i] for i in part], [samples[i] for i in part]
            last = number == len(parts) - 1
            with contextlib.nullcontext() if last else self.accelerator.no_sync(model):
                micro_batch = MicroBatch(rows, encoded, len(part) / len(inputs))
                with self.metrics.of_part(micro_batch.share, last):
                    loss += super().training_step(model, micro_batch, num_items_in_batch)
        return loss

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        part = inputs if isinstance(inputs, MicroBatch) else MicroBatch(inputs, self.encoder.encode_rows(inputs), 1.0)
        self.last_inputs = part.rows
        loss = self.loss(model, self.encoder.batch(part.rows, part.samples)) * part.share
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
        self.metrics.note(values)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs or "train_loss" in logs:  # of training; what else is logged in between takes nothing away
            logs = {**logs, **self.metrics.means()}
            self.metrics.clear()
        super().log(logs, start_time)

    def floating_point_ops(self, inputs) -> int:
        return 0  # most of the work is the frozen LVLM's, of which the optimizer's model knows nothing

    def train(self, resume_from_checkpoint: str | bool | None = None, trial=None, ignore_keys_for_eval=None):
        r"""
        As [`~transformers.Trainer.train`]. A resumed run does what an uninterrupted one would have done.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*): a checkpoint of a run with the same settings; `True`
                for the newest in `output_dir` that is whole, of the last run that was started there.

        Raises:
            `ValueError`: when there is none to resume from, or a file of it is missing or damaged; and while another
                process trains in `output_dir`.
            `OSError`: when a checkpoint could not be written; those before it are as they were.
        """
        with alone_in(Path(self.args.output_dir)) if self.is_world_process_zero() else contextlib.nullcontext():
            return self.train_alone(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def train_alone(self, resume_from_checkpoint: str | bool | None, trial: Any, ignore_keys: Any) -> TrainOutput:
        """Trains, where nobody else writes into the directory."""
        checkpoint = checkpoint_to_resume(resume_from_checkpoint, self.args) if resume_from_checkpoint else None
        if checkpoint is not None:
            self.restore(checkpoint)
            self.run = run_of(checkpoint) or 0
        else:
            self.run = new_run(Path(self.args.output_dir)) if self.args.should_save else 0
            set_seed(self.args.seed)  # as after `__init__`, whatever was drawn since then
        self.run_log.facts["run"] = self.run
        self.tprl_model.lvlm.requires_grad_(False)
        self.networks(self.tprl_model, self.args)  # another trainer of the model may have set them since
        # transformers would delete old checkpoints before the new one is marked
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self.save_total_limit = limit
        try:
            output = super().train(None if checkpoint is None else str(checkpoint), trial, ignore_keys)
        except NothingLeft:  # all is restored
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            output = TrainOutput(self.state.global_step, 0.0, {})
        except (OSError, RuntimeError, SafetensorError) as error:
            if self.being_written is None:
                raise
            raise could_not_be_written(self.being_written, error) from error
        finally:
            self.args.save_total_limit = limit
        self.finish()
        return output

    def begin(self) -> None:
        """Called before the first step, not when resumed."""

    def finish(self) -> None:
        """Called after the last step."""
        self.tprl_model.eval()

    # ---- measuring ----

    def measure(self, dataset: Dataset) -> dict[str, float]:
        """What `evaluate` finds out about one dataset, by names without a prefix."""
        raise NotImplementedError

    @torch.no_grad()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        r"""
        Measures the networks as they are; see the trainer's `measure` for what is measured.

        Args:
            eval_dataset (`datasets.Dataset`, a dict of such, or a key of the trainer's own dict, *optional*): by
                default that of the trainer.
            ignore_keys: has no meaning here.
            metric_key_prefix (`str`, defaults to `"eval"`): with which the names of the metrics begin.

        Returns:
            `dict`: the metrics; of a dict of datasets those of each set NAME, `eval_NAME_...`, and their means.

        Raises:
            `ValueError`: without a dataset, or where it has no column that is needed.
        """
        data = self.eval_dataset if eval_dataset is None else eval_dataset
        if isinstance(data, str):
            data, metric_key_prefix = self.eval_dataset[data], f"{metric_key_prefix}_{data}"
        data = given_dataset(data, "eval_dataset")
        if data is None:
            raise ValueError("Nothing to evaluate on: pass eval_dataset.")
        if isinstance(data, dict):
            found = {name: self.measure(one) for name, one in data.items()}
            metrics = {f"{name}_{key}": value for name, one in found.items() for key, value in one.items()}
            for key in set.intersection(*map(set, found.values())):
                metrics[key] = sum(one[key] for one in found.values()) / len(found)
        else:
            metrics = self.measure(data)
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        if eval_dataset is None and metric_key_prefix == "eval":
            self.measured(metrics)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def measured(self, metrics: dict[str, float]) -> None:
        """Called with what `evaluate` found on the trainer's own dataset."""

    def predict(self, test_dataset, ignore_keys=None, metric_key_prefix: str = "test") -> PredictionOutput:
        """Refused: `evaluate` measures, and the model itself answers."""
        raise ValueError(
            f"{type(self).__name__} has nothing to predict: call trainer.evaluate(dataset) for its metrics, or the "
            "model's own `encode_images` and `generate`."
        )

    # ---- directories ----

    def saved_state(self) -> dict[str, Any]:
        """What a checkpoint must hold besides weights, optimizer, scheduler and random state."""
        return {"metrics": dict(self.metrics), "stage": self._stage}

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
        state = torch.load(path, map_location=place, weights_only=True)
        stage = state.get("stage", self._stage)  # older versions did not say it
        if stage != self._stage:
            raise ValueError(
                f"{checkpoint} is of a training with {stage}, not {self._stage}: resume it with that trainer, or "
                "start again in another output_dir."
            )
        self.load_state(state)

    def mark_checkpoint(self) -> None:
        """Notes that the checkpoint which was just written is whole, and deletes those that it replaces."""
        assert self.being_written is not None
        self.accelerator.wait_for_everyone()  # each process has written its part
        if self.args.should_save:
            mark_whole(self.being_written, self.args.world_size, self.run)
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
        facts = {"stages": [self.stage_record()], "tags": self._tag_names, **facts}
        facts.update(token=token, revision=revision, private=private, commit_message=commit_message)
        call = functools.partial(publish, self.args.output_dir, self.hub_model_id, **facts)
        return call() if blocking else HfApi(token=token).run_as_future(call)

    def stage_record(self) -> dict[str, Any]:
        """What a card says of this training."""
        logs = [
            {name.removeprefix("eval_"): value for name, value in entry.items() if name.startswith("eval_")}
            for entry in self.state.log_history
        ]
        measured = [entry for entry in logs if entry]
        metrics = measured[-1] if measured else {}
        return {"stage": self._name, "settings": changed_settings(self.args), "metrics": metrics}

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        r"""
        Writes `README.md` into `output_dir`: how to load the model, and how it was trained. `push_to_hub` brings it up
        to date, and leaves what you add to it.

        Args:
            model_name (`str`, *optional*): the title; by default the name of the directory.
            dataset_name (`str`, *optional*): the dataset's name on the Hub.
            tags (`str` or `list[str]`, *optional*): more tags.
        """
        if not self.is_world_process_zero():
            return
        directory = Path(self.args.output_dir)
        directory.mkdir(parents=True, exist_ok=True)
        more = [tags] if isinstance(tags, str) else list(tags or [])
        write_card(
            directory, self.tprl_model, model_name or self.hub_model_id or directory.resolve().name,
            stages=[self.stage_record()], tags=[*self._tag_names, *more], dataset_name=dataset_name,
        )  # fmt: skip
