"""A LoRA of PEFT inside a checkpoint: the LLM that was tuned on pruned prompts, beside the policy that prunes them.

PEFT is called directly where transformers only hands on: transformers 5.24 refuses releases of PEFT before 0.22, which
was not out when it came.
"""

import functools
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import PeftAdapterMixin
from transformers.utils import is_peft_available

FOLDER = "adapter"
WEIGHTS = "adapter_model.safetensors"
OF_ADAPTERS = (".lora_", ".modules_to_save.", ".trainable_tokens_")
# What PEFT puts into the names of weights that were there before, the longest first.
WRAPPERS = (".token_adapter.base_layer.", ".base_layer.", ".original_module.")


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether `load_adapter` has put one into the model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def without_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights that were there before, by the names that they had."""
    return {
        functools.reduce(lambda short, wrapper: short.replace(wrapper, "."), WRAPPERS, name): value
        for name, value in state.items()
        if not any(mark in name for mark in OF_ADAPTERS)
    }


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
    from peft import get_peft_model_state_dict

    refuse_unless_one_lora(model)
    (name,) = model.peft_config
    folder = directory / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(model, adapter_name=name)
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
        model.load_adapter(os.path.join(source, inside))
    else:
        model.load_adapter(source, adapter_kwargs={**kwargs, "subfolder": inside})


def wrong_weights(model: Any, info: Any, source: str | None, name: str, kwargs: dict[str, Any] | None) -> list[str]:
    """
    Weights of the LoRA `name` that are missing or have no place, after PEFT has read again what
    transformers did not find: transformers 5.24 leaves the magnitudes of DoRA as they were made.
    """
    wrong = sorted({*info.missing_keys, *info.unexpected_keys})
    if not wrong or source is None:
        return wrong
    from peft.utils import load_peft_weights, set_peft_model_state_dict

    options = {key: value for key, value in (kwargs or {}).items() if not key.startswith("_")}
    read = load_peft_weights(source, device="cpu", **options)
    state = {key.removeprefix("base_model.model."): value for key, value in read.items()}
    try:
        found = set_peft_model_state_dict(model, state, name)
    except KeyError as missing:  # of a module that is saved as a whole
        return [str(missing.args[0])]
    absent = [key for key in found.missing_keys if any(mark in key for mark in OF_ADAPTERS) and f".{name}" in key]
    return sorted([*absent, *found.unexpected_keys])


class TPRLAdapterMixin(PeftAdapterMixin):
    """What transformers' models have for PEFT. `save_pretrained` saves a LoRA beside the policy."""

    peft_config: dict[str, Any]

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """Raises `ValueError`: `Trainer` could not resume what it adds."""
        raise ValueError(
            "add_adapter would add weights that a resumed Trainer does not find again: train with "
            "peft.get_peft_model(model, config), save that, and put it into this model with "
            "model.load_adapter(DIRECTORY): save_pretrained then saves policy and LoRA together."
        )

    def load_adapter(
        self,
        peft_model_id: str | None = None,
        adapter_name: str | None = None,
        *args,
        is_trainable: bool = False,
        **kwargs,
    ) -> Any:
        """As [`~transformers.PreTrainedModel.load_adapter`]: `save_pretrained` saves the LoRA beside the policy.

        Raises:
            `ValueError`: for `is_trainable=True`, because a `Trainer` that resumes would not find the LoRA again; and
                when a weight of it is missing or has no place.
        """
        if is_trainable:
            raise ValueError(
                "load_adapter(is_trainable=True) would train weights that a resumed Trainer does not find: train "
                "with peft.PeftModel.from_pretrained(model, DIRECTORY, is_trainable=True)."
            )
        info = super().load_adapter(peft_model_id, adapter_name, *args, **kwargs)
        name = adapter_name or "default"
        wrong = wrong_weights(self, info, peft_model_id, name, kwargs.get("adapter_kwargs"))
        if wrong:
            raise ValueError(
                f"{len(wrong)} weights of the LoRA in {peft_model_id} are missing or have no place (as {wrong[0]}): "
                "copy it again."
            )
        return info

    def enable_adapters(self) -> None:
        """Switches the LoRA on again. Raises `ValueError` where there is none."""
        self._switch_adapters(True)

    def disable_adapters(self) -> None:
        """Switches the LoRA off, without removing it. Raises `ValueError` where there is none."""
        self._switch_adapters(False)

    def _switch_adapters(self, on: bool) -> None:
        self._refuse_without_adapter()
        from peft.tuners.tuners_utils import BaseTunerLayer
        from peft.utils.other import AuxiliaryTrainingWrapper

        for module in self.modules():
            if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
                module.enable_adapters(enabled=on)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """Removes LoRAs by name. Raises `ValueError` for one that is not there."""
        self._refuse_without_adapter()
        from peft.functional import delete_adapter

        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        if absent := [name for name in names if name not in self.peft_config]:
            raise ValueError(f"The model has no adapter {', '.join(absent)}; it has {', '.join(self.peft_config)}.")
        for name in names:
            kind = self.peft_config.pop(name).peft_type.value.lower()
            delete_adapter(self, adapter_name=name, prefix=f"{kind}_")
        if not self.peft_config:
            del self.peft_config
            self._hf_peft_config_loaded = False

    def _refuse_without_adapter(self) -> None:
        if not self._hf_peft_config_loaded:
            raise ValueError("The model has no adapter: model.load_adapter(DIRECTORY) puts one into it.")
