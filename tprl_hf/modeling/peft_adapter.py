"""A LoRA of PEFT inside a checkpoint: the LLM that was tuned on pruned prompts, beside the policy that prunes them."""

import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import is_peft_available

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
_OF_LORA, _BASE_LAYER = ".lora_", ".base_layer."


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether `load_adapter` has put one into the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def without_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that were there before, by the names that they had."""
    return {name.replace(_BASE_LAYER, "."): value for name, value in state.items() if _OF_LORA not in name}


def refuse_unless_one_lora(model: Any) -> None:
    """Raises `ValueError` for what a checkpoint could not bring back."""
    kinds = {name: str(one.peft_type).rpartition(".")[2] for name, one in model.peft_config.items()}
    if len(kinds) != 1 or set(kinds.values()) != {"LORA"}:
        raise ValueError(
            f"A checkpoint holds one LoRA beside the policy; the model has {kinds}. Remove the others with "
            "model.delete_adapter(NAME)."
        )


def save_adapter(model: Any, directory: Path, base: str | None) -> None:
    """
    Writes the folder `adapter`, which [`load_own_adapter`], `model.load_adapter` and `PeftModel.from_pretrained` read.

    Args:
        base (`str`, *optional*): the name of the checkpoint that it belongs to.
    """
    refuse_unless_one_lora(model)
    (name,) = model.peft_config
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state = model.get_adapter_state_dict(name)
    # PEFT's own names: those of a PeftModel around this one
    named = {f"base_model.model.{key}": value.detach().contiguous().cpu() for key, value in state.items()}
    save_file(named, folder / WEIGHTS, metadata={"format": "pt"})
    config = model.peft_config[name]
    before = config.base_model_name_or_path, config.inference_mode
    config.base_model_name_or_path, config.inference_mode = base, True
    try:
        config.save_pretrained(folder)
    finally:
        config.base_model_name_or_path, config.inference_mode = before


def load_own_adapter(model: Any, source: str, hub_kwargs: dict[str, Any]) -> None:
    """
    Puts the LoRA of the checkpoint `source` into the model.

    Raises:
        `ImportError`: without PEFT.
        `ValueError`: when a weight of it is missing or has no place.
    """
    if not is_peft_available():
        raise ImportError(f"{source} holds a LoRA, which needs PEFT: pip install 'tprl_hf[train]'.")
    kwargs = {name: value for name, value in hub_kwargs.items() if name != "subfolder"}
    inside = "/".join(part for part in (hub_kwargs.get("subfolder"), FOLDER) if part)
    if os.path.isdir(source):
        info = model.load_adapter(os.path.join(source, inside))
    else:
        info = model.load_adapter(source, adapter_kwargs={**kwargs, "subfolder": inside})
    wrong = sorted({*info.missing_keys, *info.unexpected_keys})
    if wrong:
        raise ValueError(
            f"{len(wrong)} weights of the LoRA in {source}/{FOLDER} are missing or have no place (as {wrong[0]}): "
            "copy the checkpoint again."
        )
