"""The LLM learns from pruned prompts (Table 5 of the TPRL paper): TRL's SFTTrainer, a LoRA of PEFT, mixed budgets."""

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, List
from datasets import Image as ImageFeature
from safetensors import SafetensorError
from transformers import TrainerCallback

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.peft_adapter import FOLDER, has_adapter, refuse_unless_one_lora, save_adapter
from tprl_hf.modeling.text_query import messages_of
from tprl_hf.modeling.values import KEPT_FRACTION, list_of, whole
from tprl_hf.pictures import images_of

from .answer_batches import SampleEncoder, reference_answer, undecoded
from .trainer_arguments import has_answers, needs_answers, take_one_device
from .training_lock import alone_in
from .unpruned_answers import COLUMN, UnprunedAnswers
from .whole_checkpoints import (
    MANIFEST,
    AfterSaving,
    NothingLeft,
    StopBeforeAnotherStep,
    could_not_be_written,
    mark_whole,
)

# Of the LLM alone: vision tower, projector and policy stay as they are.
LLM_LAYERS = r"lvlm\..*language_model.*\.(q|k|v|o|gate|up|down)_proj"
BUDGETS = ("keep_ratio", "num_keep", "threshold")


class MixedBudgets(TrainerCallback):
    """
    Lets each optimizer step of any `Trainer` prune to a budget of its own, so that one LoRA serves all budgets.
    Between steps, when it evaluates or saves, the model has the budget that it came with.

    Args:
        model ([`TPRLForConditionalGeneration`]): the model that is trained, without an adapter around it.
        keep_ratios (`list[float]`): fractions that are kept, drawn with equal chances; 1 prunes nothing.
        seed (`int`, defaults to 0): of the draws, which follow from the number of the step alone.

    Raises:
        `ValueError`: for a pruner with a budget of its own, which would go before these.

    Example:

    ```python
    >>> trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=processor, peft_config=lora)
    >>> trainer.add_callback(MixedBudgets(model, [1, 1 / 3, 1 / 9]))
    ```
    """

    def __init__(self, model: TPRLForConditionalGeneration, keep_ratios: Sequence[float], seed: int = 0):
        keep_ratios = list_of(KEPT_FRACTION, least=1)("keep_ratios", keep_ratios)
        seed = whole()("seed", seed)
        if model.pruner.budget is not None:
            raise ValueError(
                f"{type(model.pruner).__name__} has a budget of its own, {model.pruner.budget}, which goes before "
                "keep_ratios: set the pruner without one."
            )
        self.config, self.keep_ratios, self.seed = model.config, keep_ratios, seed
        self.own = {name: getattr(model.config, name) for name in BUDGETS}

    def ratio_of(self, step: int) -> float:
        """The budget of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return self.keep_ratios[int(torch.randint(len(self.keep_ratios), (1,), generator=generator))]

    def on_step_begin(self, args, state, control, **kwargs):
        self.config.update({**dict.fromkeys(BUDGETS), "keep_ratio": self.ratio_of(state.global_step)})

    def on_step_end(self, args, state, control, **kwargs):
        self.config.update(self.own)


def as_chats(dataset: Dataset) -> Dataset:
    """Rows with `images`, `prompt` and `answer` as TRL takes them: `images`, `prompt` and `completion` as messages."""

    # TRL reads one column, of lists
    as_they_are = dataset.features.get("images") == List(ImageFeature()) and "image" not in dataset.column_names

    def chat(row: dict[str, Any]) -> dict[str, Any]:
        pictures = {} if as_they_are else {"images": images_of(row)}
        said = [{"role": "assistant", "content": reference_answer(row)}]
        return {**pictures, "prompt": messages_of(row["prompt"]), "completion": said}

    kept = ("images", "prompt", "answer")
    others = [name for name in dataset.column_names if name not in kept]
    rows = undecoded(dataset).map(chat, remove_columns=[*others, "answer"])
    return rows.cast_column("images", List(ImageFeature()))


def with_own_answers(
    model: TPRLForConditionalGeneration, processor: Any, dataset: Dataset, directory: str | Path
) -> Dataset:
    """`dataset` with what the LVLM answers unpruned as its column `answer`; answers are kept in `directory`."""
    model.eval()
    answered = UnprunedAnswers(model, processor, directory).add_to(undecoded(dataset), SampleEncoder(model, processor))
    answers = [row["text"] for row in answered[COLUMN]]
    return dataset.remove_columns(sorted({"answer"} & {*dataset.column_names})).add_column("answer", answers)


def with_own_lora(model: TPRLForConditionalGeneration) -> Any:
    """The model with the LoRA of its checkpoint as PEFT's own, to be trained."""
    from peft import PeftModel

    refuse_unless_one_lora(model)
    with tempfile.TemporaryDirectory() as scratch:
        save_adapter(model, Path(scratch), None)
        model.delete_adapter(next(iter(model.peft_config)))
        return PeftModel.from_pretrained(model, str(Path(scratch, FOLDER)), is_trainable=True)


def tune_lvlm(
    model: TPRLForConditionalGeneration,
    processor: Any,
    dataset: Dataset,
    args: Any,
    keep_ratios: Sequence[float],
    lora: dict[str, Any] | None = None,
    resume_from_checkpoint: str | None = None,
    callbacks: Sequence[Any] = (),
    unpruned_answers_dir: str | None = None,
) -> list[dict[str, float]]:
    """
    Trains a LoRA of the LLM on pruned prompts, and leaves it in the model: `save_pretrained` saves policy and LoRA in
    one directory. Vision tower, projector and policy do not change. A LoRA that the model has is trained on.

    Args:
        model ([`TPRLForConditionalGeneration`]): with a trained policy, or another pruner.
        processor: its processor.
        dataset (`datasets.Dataset`): rows with `images`, `prompt` and `answer`; without labels the LLM learns what it
            answers unpruned itself.
        args (`trl.SFTConfig`): how long, how fast.
        keep_ratios (`list[float]`): see [`MixedBudgets`]; `[1]` trains unpruned.
        lora (`dict`, *optional*): fields of `peft.LoraConfig` that replace rank 16, alpha 32 and the linear layers of
            the LLM.
        resume_from_checkpoint (`str`, *optional*): a checkpoint of a run with the same settings.
        callbacks: functions that take the trainer and give a callback.
        unpruned_answers_dir (`str`, *optional*): where such answers are kept; in `unpruned_answers` of the run's
            directory by default.

    Returns:
        `list[dict]`: what was logged.

    Raises:
        `ValueError`: for a LoRA beside one that the model has, a model that cannot be tuned, and while another process
            trains in `args.output_dir`.
        `OSError`: when a checkpoint could not be written; those before it are as they were.
    """
    from peft import LoraConfig
    from trl import SFTTrainer

    model.read_chat_template(processor)  # tells the question from the answer
    if has_answers(dataset):
        needs_answers(dataset, "dataset", "remove the rows without, or the column")
    else:
        directory = unpruned_answers_dir or Path(args.output_dir) / "unpruned_answers"
        dataset = with_own_answers(model, processor, dataset, directory)
    take_one_device(args)
    if has_adapter(model):
        if lora:
            raise ValueError(f"The model has a LoRA already, which is trained on as it is: leave out lora={lora}.")
        start, config = with_own_lora(model), None
    else:
        settings = {"r": 16, "lora_alpha": 32, "target_modules": LLM_LAYERS, **(lora or {})}
        start, config = model, LoraConfig(task_type="CAUSAL_LM", **settings)
    trainer = SFTTrainer(
        start, args, train_dataset=as_chats(dataset), processing_class=processor, peft_config=config
    )  # fmt: skip
    trainer.add_callback(MixedBudgets(model, keep_ratios, args.seed))
    trainer.add_callback(
        AfterSaving(lambda: mark_whole(Path(args.output_dir, f"checkpoint-{trainer.state.global_step}")))
    )
    for make in callbacks:
        trainer.add_callback(make(trainer))
    trainer.add_callback(StopBeforeAnotherStep())
    try:
        with alone_in(Path(args.output_dir)) if args.process_index == 0 else contextlib.nullcontext():
            trainer.train(resume_from_checkpoint=resume_from_checkpoint)
    except NothingLeft:  # all is restored
        pass
    except (OSError, RuntimeError, SafetensorError) as error:
        being_written = Path(args.output_dir, f"checkpoint-{trainer.state.global_step}")
        if not being_written.exists() or (being_written / MANIFEST).exists():
            raise
        raise could_not_be_written(being_written, error) from error
    with tempfile.TemporaryDirectory() as scratch:
        trainer.model.save_pretrained(scratch)
        trainer.model.unload()
        model.load_adapter(scratch)
    model.eval()
    return trainer.state.log_history
