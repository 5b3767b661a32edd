"""What a trainer is handed: a model by its name, defaults as in TRL, datasets that it can use; or one clear line."""

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.compute as pc  # type: ignore[import-untyped]
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, TrainingArguments
from transformers.utils import logging

from tprl_hf.missing_packages import load_processor
from tprl_hf.modeling.base_weights import refuse_adapters
from tprl_hf.modeling.configuration_tprl import TPRLConfig
from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration
from tprl_hf.modeling.peft_adapter import has_adapter

from .answer_batches import undecoded

logger = logging.get_logger(__name__)

ROWS_AT_ONCE = 1000
_SAMPLES = "rows of a dataset are encoded where they are used, so that images are processed once"
_MEASURED = "`evaluate` measures accuracy and log-probability: for more, call `model.generate`"
_ROLLOUTS = "a rollout here is a series of keep masks, and nothing is generated between them"
# Arguments of TRL's trainers that ours do not take, and what to do instead.
NOT_TAKEN = {
    "peft_config": "the policy is trained whole, and the LVLM stays frozen: tune the LVLM with TRL's own trainers",
    "quantization_config": "load the model with it, and pass the model",
    "compute_metrics": _MEASURED,
    "preprocess_logits_for_metrics": _MEASURED,
    "compute_loss_func": "the loss is that of the algorithm: override `loss` or `trajectory_losses`",
    "data_collator": _SAMPLES,
    "formatting_func": f"{_SAMPLES}: map the dataset to `prompt`, `images` and `answer`",
    "model_init": "pass the model",
    "optimizer_cls_and_kwargs": "pass `optimizers`, or set `args.optim`",
    "ref_model": "the start of the policy is what it is compared with: `args.beta` is the weight",
    "reward_model": "pass `reward_funcs`, functions that return one number for each completion",
    "value_model": "the policy has a value head",
    "reward_processing_classes": "a reward is a function, which calls its own model and tokenizer",
    "rollout_func": _ROLLOUTS,
    "tools": _ROLLOUTS,
    "environment_factory": _ROLLOUTS,
}


def refuse_other_arguments(trainer: str, others: Mapping[str, Any]) -> None:
    """Raises `TypeError` for arguments that a trainer does not have. One of TRL's that is `None` asks for nothing."""
    for name, value in others.items():
        if name not in NOT_TAKEN:
            raise TypeError(f"{trainer} has no argument {name!r}.")
        if value is not None:
            raise TypeError(f"{trainer} takes no `{name}`: {NOT_TAKEN[name]}.")


def config_class(trainer: type) -> type[TrainingArguments]:
    """The config of a trainer's class: the annotation of its `args`."""
    annotations = (inspect.get_annotations(base) for base in trainer.__mro__)
    return next(found["args"] for found in annotations if "args" in found)


def given_args(trainer: type, args: Any, model: Any, stage: str) -> Any:
    """
    The config of a trainer; without `args` its defaults, in a directory that is named after model and stage.

    Raises:
        `TypeError`: for anything else than the config of that trainer.
    """
    wanted = config_class(trainer)
    if args is None:
        name = model if isinstance(model, str | os.PathLike) else getattr(model, "name_or_path", "")
        args = wanted(f"{Path(name).name or 'tprl'}-{stage}")
    elif not isinstance(args, wanted):
        rewards = " Reward functions are `reward_funcs=`, by name." if callable(args) else ""
        raise TypeError(f"args of {trainer.__name__} is a {wanted.__name__}; got {type(args).__name__}.{rewards}")
    take_one_device(args)
    return args


def take_one_device(args: TrainingArguments) -> None:
    """One process computes on one accelerator: transformers would use `DataParallel`, which cannot cut our batches."""
    if args.n_gpu > 1:
        logger.warning(
            f"One of {args.n_gpu} accelerators trains: start it with torchrun or accelerate launch to use all of them."
        )
        args._n_gpu = 1


def given_model(model: Any) -> TPRLForConditionalGeneration:
    """
    The model to train; a name or path is loaded, and that of a base model gets a new policy.

    Raises:
        `TypeError`: for a model of another class.
        `ValueError`: for adapters that no checkpoint would bring back.
    """
    if isinstance(model, str | os.PathLike):
        if AutoConfig.from_pretrained(model).model_type == TPRLConfig.model_type:
            return TPRLForConditionalGeneration.from_pretrained(model, dtype="auto")
        return TPRLForConditionalGeneration.from_base_model(model, dtype="auto")
    if isinstance(model, TPRLForConditionalGeneration):
        if not has_adapter(model):  # before the work, which could not be saved
            refuse_adapters(name for name, _ in model.named_parameters())
        return model
    cure = "wrap a base model with TPRLForConditionalGeneration.from_base_model(model)"
    if hasattr(model, "merge_and_unload"):
        cure = "of a PEFT model take model.merge_and_unload()"
    raise TypeError(f"model is a TPRLForConditionalGeneration, a name or a path; got {type(model).__name__}: {cure}.")


def given_processor(processor: Any, model: TPRLForConditionalGeneration) -> Any:
    """
    The processor; without one that beside the model, or that of its base model.

    Raises:
        `ValueError`: when neither has one.
    """
    if processor is not None:
        return processor
    places = [place for place in (model.name_or_path, model.config.base_model_name_or_path) if place]
    for place in places:
        try:
            return load_processor(place)
        except OSError as error:
            logger.info(f"{place} has no processor ({error}).")
    found = " or ".join(places) or "the model, which has no name"
    raise ValueError(f"There is no processor at {found}: pass processing_class, the processor of the base model.")


def given_dataset(dataset: Any, name: str) -> Any:
    """
    A dataset whose images stay undecoded, or a dict of such; `None` stays `None`.

    Args:
        dataset: what the user passed.
        name (`str`): what messages call it.

    Raises:
        `TypeError`: for what is not a `datasets.Dataset`, such as a stream.
        `ValueError`: for a dataset without rows, or without the columns that each sample has; for no set in a dict.
    """
    if dataset is None:
        return None
    if isinstance(dataset, Mapping) and name == "eval_dataset":
        if not dataset:
            raise ValueError("eval_dataset has no sets: pass a dataset, a dict of some, or None.")
        return {key: given_dataset(one, f"{name}[{key!r}]") for key, one in dataset.items()}
    if not isinstance(dataset, Dataset):
        cure = "make one with Dataset.from_list(rows)"
        if isinstance(dataset, Mapping):
            cure = f"pass one of {', '.join(map(repr, dataset))}"
        elif isinstance(dataset, IterableDataset):
            cure = "rows are drawn by their number, so a stream must end: Dataset.from_list(list(stream.take(1000)))"
        raise TypeError(f"{name} is a datasets.Dataset; got {type(dataset).__name__}: {cure}.")
    check_rows(dataset, name)
    return undecoded(dataset)


def check_rows(dataset: Dataset, name: str) -> None:
    """Raises `ValueError` for a dataset without rows, or without the columns that each sample has."""
    columns = dataset.column_names
    for wanted in ("prompt", "images"):
        if wanted not in columns and not (wanted == "images" and "image" in columns):
            raise ValueError(f"{name} has no column {wanted!r}, only {', '.join(columns)}: rename_column gives it.")
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows.")
    for other in {"video", "videos"}.intersection(columns):
        if num_filled(dataset, other):
            raise ValueError(
                f"{name} has videos in its column {other!r}, which are not read: put frames of them into `images`, or "
                f"remove_columns({other!r})."
            )
    if missing := len(dataset) - num_filled(dataset, "prompt"):
        raise ValueError(f"{missing} of {len(dataset)} rows of {name} have no `prompt`: fill or leave out these rows.")


def with_pictures(dataset: Dataset, name: str) -> Dataset:
    """
    The rows that have a picture: of others there is nothing to learn about pruning. One line says how many there are.

    Raises:
        `ValueError`: for a dataset that has none.
    """
    columns = [column for column in ("images", "image") if column in dataset.column_names]
    has_picture = np.concatenate(
        [
            np.any([is_filled(table[column]) for column in columns], axis=0)
            for table in dataset.select_columns(columns).with_format("arrow").iter(ROWS_AT_ONCE)
        ]
    )
    if has_picture.all():
        return dataset
    if not has_picture.any():
        raise ValueError(
            f"No row of {name} has a picture, so that there are no visual tokens to prune: {' and '.join(columns)} "
            f"of all {len(dataset)} rows are empty."
        )
    logger.warning(f"{name}: {(~has_picture).sum()} of {len(dataset)} rows have no picture, and are left out.")
    return dataset.select(has_picture.nonzero()[0])


def is_filled(column: pa.ChunkedArray) -> np.ndarray:
    """Where a column holds a value, or a list with one."""
    if not pa.types.is_nested(column.type) or pa.types.is_struct(column.type):
        return column.is_valid().to_numpy()
    lists = column.combine_chunks()
    filled = np.zeros(len(lists), dtype=bool)
    filled[pc.list_parent_indices(lists).filter(pc.list_flatten(lists).is_valid()).to_numpy()] = True
    return filled


def num_answers(dataset: Dataset) -> int:
    """How many rows of a dataset have an answer."""
    return num_filled(dataset, "answer") if "answer" in dataset.column_names else 0


def num_filled(dataset: Dataset, name: str) -> int:
    """How many rows of a dataset have something in a column."""
    return int(is_filled(dataset.select_columns(name).with_format("arrow")[:][name]).sum())


def has_answers(dataset: Dataset) -> bool:
    """Whether any row of a dataset has an answer."""
    return num_answers(dataset) > 0


def needs_answers(dataset: Any, name: str, cure: str) -> None:
    """Raises `ValueError` for a dataset whose rows do not all have an `answer`."""
    if not isinstance(dataset, Dataset) or (count := num_answers(dataset)) == len(dataset):
        return
    if count:
        raise ValueError(f"{len(dataset) - count} of {len(dataset)} rows of {name} have no `answer`: {cure}.")
    raise ValueError(f"{name} has no column 'answer', only {', '.join(dataset.column_names)}: {cure}.")
