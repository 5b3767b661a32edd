"""What all training configs have in common."""

import os
from dataclasses import dataclass, field, fields
from typing import Literal, get_args, get_origin

from transformers import TrainingArguments
from transformers.utils import logging

logger = logging.get_logger(__name__)


@dataclass
class PrunerTrainingConfig(TrainingArguments):
    r"""
    Base of all our configs. Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        output_dir (`str`):
            Where checkpoints and, at the end, the trained policy go: a directory that `from_pretrained` takes.
        feature_cache_mb (`int`, defaults to 1024):
            Room for visual features, which are computed once for each image while they fit.
        score_batch_size (`int`, defaults to 64):
            Prompts that run through the frozen LLM together.
        save_base_model (`bool`, *optional*):
            Save the frozen LVLM too, at the end of training. By default, where the policy could not find it again: it
            has no name, or was tuned.
        logging_steps (`float`, defaults to 10), save_total_limit (`int`, defaults to 2),
        remove_unused_columns (`bool`, defaults to `False`), report_to (`str`, defaults to `"none"`),
        dataloader_pin_memory (`bool`, defaults to `False`),
        ddp_find_unused_parameters (`bool`, defaults to `True`), hub_strategy (`str`, defaults to `"end"`):
            Other defaults than in `TrainingArguments`. With another `hub_strategy` transformers itself pushes each
            checkpoint too, with its pickles and without our code and card.

    Raises:
        `ValueError`: under FSDP or DeepSpeed, and for a choice that there is not.
    """

    feature_cache_mb: int = 1024
    score_batch_size: int = 64
    save_base_model: bool | None = None
    logging_steps: float = 10
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    report_to: str | list[str] = "none"
    dataloader_pin_memory: bool = False  # batches are rows, not tensors
    hub_strategy: str = "end"
    gradient_checkpointing: bool = False
    ddp_find_unused_parameters: bool | None = True  # a policy without questions leaves query_proj alone

    def __post_init__(self):
        for kind, setting in {"FSDP": self.fsdp, "DEEPSPEED": self.deepspeed}.items():
            if setting or os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":  # of its launcher
                raise ValueError(
                    f"Rollouts need the networks whole in each process, and {kind} shares weights out: start with "
                    "torchrun, or with recipes/accelerate/ddp.yaml."
                )
        for one in fields(self):
            if get_origin(one.type) is Literal and getattr(self, one.name) not in get_args(one.type):
                choices = " or ".join(map(str, get_args(one.type)))
                raise ValueError(f"{one.name} is {choices}; got {getattr(self, one.name)!r}.")
        if self.gradient_checkpointing:
            logger.warning(
                "gradient_checkpointing=True has no effect: no gradient goes through the LVLM, and the policy is "
                "small. For memory set score_batch_size or, in reinforcement learning, micro_batch_size."
            )
            self.gradient_checkpointing = False
        super().__post_init__()


@dataclass
class PolicyTrainingConfig(PrunerTrainingConfig):
    r"""
    Base of the configs that train the policy.

    Args:
        eval_keep_ratios (`list[float]`, defaults to 1/3, 2/9 and 1/9):
            Budgets at which the policy is measured on `eval_dataset`, as it prunes at inference.
        keep_best (`bool`, defaults to `True`):
            End with the weights that were best on `eval_dataset`, start and end included; without it, with the last.
            `eval_strategy` says how often it is measured in between.
        best_metric (`"accuracy"` or `"logprob"`, defaults to `"logprob"`):
            What "best" means: accuracy, or the mean log-probability of the reference answer, which is less noisy. Both
            are averages over `eval_keep_ratios`.
        keep_ratio (`float`, *optional*):
            Default budget that the trained model's config names. Left as it is when `None`.
    """

    eval_keep_ratios: list[float] = field(default_factory=lambda: [1 / 3, 2 / 9, 1 / 9])
    keep_best: bool = True
    best_metric: Literal["accuracy", "logprob"] = "logprob"
    keep_ratio: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if not all(0 < ratio <= 1 for ratio in self.eval_keep_ratios):
            raise ValueError(f"eval_keep_ratios are fractions that are KEPT, in (0, 1]; got {self.eval_keep_ratios}.")
