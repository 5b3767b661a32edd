"""The stage `tune` of `tprl train`: a LoRA of the LLM on pruned prompts, saved with the policy."""

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .processes import is_first_process, say
from .recipe_file import check_names

if TYPE_CHECKING:
    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

    from .stop_signals import StopSignals

OWN = ("keep_ratios", "lora", "num_samples")
# TRL's, where ours differ: no tracker, and no cut through a prompt, which would cut images.
DEFAULTS = {"report_to": "none", "max_length": None, "logging_steps": 10, "save_total_limit": 2}


def make_config(recipe: dict[str, Any], **others: Any) -> Any:
    """
    `trl.SFTConfig` of the section `tune`; `others` are fields that are not of the recipe. Raises `ValueError` for
    names and values that it does not know.
    """
    from dataclasses import fields

    import torch
    from peft import LoraConfig
    from trl import SFTConfig

    from tprl_hf.modeling.values import COUNT, KEPT_FRACTION, list_of, optional

    from .recipe_checks import check_types, restore_names

    section = recipe["tune"]
    lora = {} if section.get("lora") is None else section["lora"]
    if not isinstance(lora, dict):
        raise ValueError(f"tune.lora must be a section of peft.LoraConfig's settings, such as r: 16; got {lora!r}.")
    restore_names(section, SFTConfig, "tune")
    restore_names(lora, LoraConfig, "tune.lora")
    names = [field.name for field in fields(SFTConfig)]
    check_names(section, [*OWN, *names], "tune", [*OWN, "max_steps", "learning_rate", "per_device_train_batch_size"])
    check_names(lora, [field.name for field in fields(LoraConfig)], "tune.lora", ["r", "lora_alpha"])
    check_types(section, SFTConfig, "tune")
    check_types(lora, LoraConfig, "tune.lora")
    if "keep_ratios" not in section:
        raise ValueError("tune.keep_ratios must be a list of fractions that are KEPT, such as [1, 1/3]; got none.")
    section["keep_ratios"] = list_of(KEPT_FRACTION, least=1)("tune.keep_ratios", section["keep_ratios"])
    if "num_samples" in section:
        section["num_samples"] = optional(COUNT)("tune.num_samples", section["num_samples"])
    settings = {name: value for name, value in section.items() if name not in OWN}
    if others.get("use_cpu") or not torch.accelerator.is_available():
        settings.setdefault("bf16", False)  # TRL's default is True
    try:
        return SFTConfig(str(Path(recipe["output_dir"]) / "tune"), **{**DEFAULTS, **settings, **others})
    except (TypeError, ValueError) as error:
        raise ValueError(f"tune: {error}") from error


def tune(
    recipe: dict[str, Any],
    model: "TPRLForConditionalGeneration",
    processor: Any,
    dataset: Any,
    directory: Path,
    signals: "StopSignals",
    place: dict[str, Any],
) -> dict[str, Any]:
    """Trains the LoRA, and saves it with the policy in `directory`; `place` says where it computes."""
    from tprl_hf.training.tuning import tune_lvlm
    from tprl_hf.training.whole_checkpoints import newest_whole

    from .stop_signals import SaveAndStop

    checkpoint, passed_over = newest_whole(directory)
    for line in passed_over:
        say(f"tune: {line}")
    if checkpoint is not None or passed_over:
        say(f"tune: {'starts again' if checkpoint is None else f'resumes from {checkpoint}'}")
    section = recipe["tune"]
    saved_processor = copy.deepcopy(processor)  # a tokenizer that has padded says so in its file
    history = tune_lvlm(
        model,
        processor,
        dataset,
        make_config(recipe, **place),
        section["keep_ratios"],
        section.get("lora"),
        None if checkpoint is None else str(checkpoint),
        [lambda trainer: SaveAndStop(signals, trainer)],
        str(Path(recipe["output_dir"]) / "unpruned_answers"),
    )
    if is_first_process():
        card = directory / "README.md"
        if card.is_file() and "generated_from_trainer" in card.read_text(encoding="utf-8"):
            card.unlink()  # TRL's, which knows neither policy nor base model
        model.save_pretrained(directory, save_base_model=model.config.includes_base_model or None)
        saved_processor.save_pretrained(directory)
    return {"log_history": history}
