"""What all training configs have in common."""

import os
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args, get_origin

from transformers import TrainingArguments
from transformers.utils import logging

from tprl_hf.modeling.values import (
    COUNT,
    KEPT_FRACTION,
    NOT_NEGATIVE,
    POSITIVE,
    Check,
    check_fields,
    flag,
    list_of,
    one_of,
    optional,
    text,
    whole,
    wrong,
)

logger = logging.get_logger(__name__)


# Settings of `TrainingArguments` that read texts and their labels, and the values of them that do not.
NOT_OF_POLICIES: dict[str, tuple[Any, ...]] = {
    "label_smoothing_factor": (0,),
    "neftune_noise_alpha": (None,),
    "train_sampling_strategy": ("random", "sequential"),
}


@dataclass
class PrunerTrainingConfig(TrainingArguments):
    r"""
    Base of all our configs. Only what differs from [`~transformers.TrainingArguments`] is listed.

    Args:
        output_dir (`str`):
            Where checkpoints and, at the end, the trained policy go: a directory that `from_pretrained` takes.
        feature_cache_mb (`int`, defaults to 1024):
            Room for visual features, in MiB, never on an accelerator. Those of the images that come first are computed
            once; what finds no room is encoded at each visit.
        feature_cache_dir (`str`, *optional*):
            Keep them there, on disk, instead of in memory. Stages, epochs, processes and runs share the directory;
            each model has a folder of its own in it.
        feature_cache_dtype (`"bfloat16"` or `"float16"`, *optional*):
            Of the features on disk. By default that of the model, so that nothing changes: half precision where the
            model computes in it. For a float32 model `"float16"` halves them with an error of 1/2048 of a value, and
            `"bfloat16"` with 1/256 for models whose values exceed 65,504.
        encode_batch_size (`int`, *optional*):
            Images that the vision tower encodes at once. By default 32 on an accelerator, and 1 on a CPU, where larger
            batches gain little and rounding would depend on them.
        prefetch_threads (`int`, defaults to 1):
            Threads that read, decode and process the next batch of images while the LLM works; 0 for none.
        score_batch_size (`int`, defaults to 64), score_batch_tokens (`int`, *optional*):
            Prompts that run through the frozen LLM together, and their tokens with padding: at most. By default 2,560
            tokens on a CPU, where more do not fit into its caches, and 40,960 on an accelerator.
        micro_batch_tokens (`int`, defaults to 32,768):
            Visual tokens that autoencoder or policy are trained on at once where a batch has no micro-batches of its
            own. Gradients do not depend on it; memory does.
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
        `ValueError`: under FSDP or DeepSpeed, and for a setting that is not what it must be.
    """

    # What each field of ours may be that is neither a bool nor a choice. Each class says it of its own.
    checks: ClassVar[dict[str, Check]] = {
        "feature_cache_mb": whole(0),
        "feature_cache_dir": optional(text),
        "feature_cache_dtype": optional(one_of(("bfloat16", "float16"))),
        "encode_batch_size": optional(COUNT),
        "prefetch_threads": whole(0),
        "score_batch_size": COUNT,
        "score_batch_tokens": optional(COUNT),
        "micro_batch_tokens": COUNT,
        "save_base_model": optional(flag),
        "learning_rate": NOT_NEGATIVE,
        "num_train_epochs": POSITIVE,
        "per_device_train_batch_size": COUNT,
    }

    some_metrics: ClassVar[str]  # of those that `evaluate` gives, for messages
    no_checkpointing: ClassVar[str] = "no gradient goes through the LVLM, and the policy is small"

    feature_cache_mb: int = 1024
    feature_cache_dir: str | None = None
    feature_cache_dtype: str | None = None
    encode_batch_size: int | None = None
    prefetch_threads: int = 1
    score_batch_size: int = 64
    score_batch_tokens: int | None = None
    micro_batch_tokens: int = 32_768
    save_base_model: bool | None = None
    logging_steps: float = 10
    save_total_limit: int | None = 2
    remove_unused_columns: bool = False
    report_to: None | str | list[str] = "none"  # noqa: RUF036  the order that HfArgumentParser reads
    dataloader_pin_memory: bool = False  # batches are rows, not tensors
    hub_strategy: str = "end"
    ddp_find_unused_parameters: bool | None = True  # a policy without questions leaves query_proj alone

    def __post_init__(self):
        for kind, setting in {"FSDP": self.fsdp, "DEEPSPEED": self.deepspeed}.items():
            if setting or os.environ.get(f"ACCELERATE_USE_{kind}", "false").lower() == "true":  # of its launcher
                raise ValueError(
                    f"Rollouts need the networks whole in each process, and {kind} shares weights out: start with "
                    "torchrun, or with recipes/accelerate/ddp.yaml."
                )
        check_fields(self, self.all_checks())
        for name in ("gradient_checkpointing", "activation_checkpointing"):  # transformers 5.24 renames it
            if optional(flag)(name, getattr(self, name, None)):
                logger.warning(
                    f"{name}=True has no effect: {self.no_checkpointing}. For memory set score_batch_size or, in "
                    "reinforcement learning, micro_batch_size."
                )
                setattr(self, name, None)
        for name, harmless in NOT_OF_POLICIES.items():
            if getattr(self, name, harmless[0]) not in harmless:
                raise ValueError(f"{name}={getattr(self, name)!r} is for the losses of language models: leave it out.")
        for name in ("bf16", "fp16"):
            if optional(flag)(name, getattr(self, name)):
                logger.warning(
                    f"{name}=True has no effect: the policy computes in float32, and rollouts and updates must agree. "
                    "The LVLM computes in the dtype that it was loaded in."
                )
                setattr(self, name, False)
        if self.feature_cache_dtype is not None and self.feature_cache_dir is None:
            raise ValueError(
                f"feature_cache_dtype={self.feature_cache_dtype!r} is for features on disk: set feature_cache_dir too."
            )
        best = (self.metric_for_best_model or "").partition("@")[0]
        greater = self.greater_is_better  # type: ignore[has-type]
        if greater is None and best.endswith(("mse", "kl")):  # of which transformers knows nothing
            self.greater_is_better = False
        super().__post_init__()
        if self.metric_for_best_model in ("loss", "eval_loss"):  # what transformers asks for where nothing is set
            raise ValueError(
                f"metric_for_best_model={self.metric_for_best_model!r} is not measured, and is the default with "
                "load_best_model_at_end=True or lr_scheduler_type='reduce_lr_on_plateau': set one that `evaluate` "
                f"gives, such as {self.some_metrics}."
            )

    @classmethod
    def all_checks(cls) -> dict[str, Check]:
        """What each field of ours may be."""
        found: dict[str, Check] = {}
        for base in reversed(cls.__mro__):
            own = vars(base).get("__annotations__", {}) if issubclass(base, PrunerTrainingConfig) else {}
            found |= {name: flag for name, kind in own.items() if kind is bool}
            found |= {name: one_of(get_args(kind)) for name, kind in own.items() if get_origin(kind) is Literal}
            found |= vars(base).get("checks", {})
        return found


@dataclass
class PolicyTrainingConfig(PrunerTrainingConfig):
    r"""
    Base of the configs that train the policy.

    Args:
        eval_keep_ratios (`list[float]`, defaults to 1/3, 2/9 and 1/9):
            Budgets at which the policy is measured on `eval_dataset`, as it prunes at inference. Metrics are named by
            three decimals of them.
        keep_best (`bool`, defaults to `True`):
            End with the weights that were best on `eval_dataset`, start and end included; without it, with the last.
            `eval_strategy` says how often it is measured in between.
        best_metric (`"accuracy"` or `"logprob"`, defaults to `"logprob"`):
            What "best" means: accuracy, or the mean log-probability of the reference answer, which is less noisy. Both
            are averages over `eval_keep_ratios`. Where the reference is the LVLM's own unpruned answer they are called
            `agreement` and `agreement_logprob`; with `score="kl"` the smallest `kl` is best in place of `"logprob"`.
        keep_ratio (`float`, *optional*):
            Default budget that the trained model's config names. Left as it is when `None`.
        max_answer_length (`int`, defaults to 128):
            Tokens of the longest answer that the LVLM itself gives unpruned, which is the reference where there are no
            labels; a longer one ends there.
        unpruned_answers_dir (`str`, *optional*):
            Where these answers are kept, `OUTPUT_DIR/unpruned_answers` by default. Runs and stages may share it.
        watched_samples (`int`, defaults to 10):
            So many questions of `eval_dataset`, of different pictures, are watched: each time that the policy is
            measured their keep masks are noted, which `tprl report` shows over time. It costs no pass of the LLM.
    """

    checks: ClassVar[dict[str, Check]] = {
        "eval_keep_ratios": list_of(KEPT_FRACTION, least=1),
        "keep_ratio": optional(KEPT_FRACTION),
        "max_answer_length": COUNT,
        "unpruned_answers_dir": optional(text),
        "watched_samples": whole(0),
    }

    some_metrics: ClassVar[str] = "'eval_logprob' or, without labels, 'eval_agreement_logprob'"

    eval_keep_ratios: list[float] = field(default_factory=lambda: [1 / 3, 2 / 9, 1 / 9])
    keep_best: bool = True
    best_metric: Literal["accuracy", "logprob"] = "logprob"
    keep_ratio: float | None = None
    max_answer_length: int = 128
    unpruned_answers_dir: str | None = None
    watched_samples: int = 10

    def __post_init__(self):
        super().__post_init__()
        if len({f"{ratio:.3f}" for ratio in self.eval_keep_ratios}) < len(self.eval_keep_ratios):
            what = "budgets that differ in their first three decimals, by which metrics are named"
            raise wrong("eval_keep_ratios", self.eval_keep_ratios, what)
