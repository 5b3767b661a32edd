"""A model and its processor by the name that users write. The functions import torch, this module does not."""

import difflib
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tprl_hf

from .missing_packages import is_ours, load_processor, said

if TYPE_CHECKING:
    import torch

    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration

WIDE = 512  # of LLMs that half precision is for by default
# What transformers says of weights that do not fit.
UNFIT_WEIGHTS = ("ignore_mismatched_sizes", "loading state_dict", "conversion of the weights")
_HUB_NAME = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_model_name(name: str) -> str:
    """
    A model's name as it is, unless it can only mean a directory, and that is not a model's.

    Args:
        name (`str`): A directory, or a name on the Hub: `NAME` or `USER/NAME`.

    Raises:
        `ValueError`: If there is no such directory, or it has no config.json. Names on the Hub are not looked up.
    """
    path = Path(name)
    if path.is_dir():
        if (path / "config.json").is_file():
            return name
        models = sorted(config.parent.name for config in path.glob("*/config.json"))
        hint = f"; there is one in {', '.join(models[-3:])}" if models else ""
        raise ValueError(f"{name} is not a model's directory: it has no config.json{hint}.")
    if path.is_file():
        raise ValueError(f"{name} is a file; a model is a directory or a name on the Hub.")
    if _HUB_NAME.fullmatch(name):
        return name
    close = difflib.get_close_matches(path.name, [one.name for one in path.parent.glob("*/")], n=1)
    hint = f": did you mean {path.parent / close[0]}?" if close else "."
    raise ValueError(f"There is no directory {name}{hint}")


def config_of(name: str) -> Any:
    """
    The config of a model, by the name that users write.

    Raises:
        `OSError`, `ValueError`: If there is no such model, or its config.json is not that of one; see
            [`check_model_name`].
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    check_model_name(name)
    try:
        return AutoConfig.from_pretrained(name)
    except OSError as error:
        if Path(name).is_dir():
            raise OSError(f"{said(error)}: copy {name} again, or choose another model.") from error
        raise OSError(
            f"There is no directory {name}, and the Hub gave no such model: {said(error)}. Check the name."
        ) from error
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError, StrictDataclassError) as error:
        if isinstance(error, ValueError) and is_ours(error):  # which says more
            raise
        raise ValueError(
            f"The config.json of {name} is not that of a model which this transformers knows ({said(error)}): choose "
            "another model, or update transformers."
        ) from error


def device_named(device: "torch.device | str | None" = None) -> "torch.device":
    """
    A device by its name; by default the accelerator, or the CPU where there is none.

    Raises:
        `ValueError`: If this machine does not have it.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        found = torch.device(device or accelerator or "cpu")
        torch.empty(0, device=found)
    except (RuntimeError, AssertionError) as error:
        there = "cpu" if accelerator is None else f"cpu and {torch.accelerator.device_count()} of {accelerator.type}"
        raise ValueError(
            f"There is no device {device} ({said(error)}): this machine has {there}; pass one of these."
        ) from error
    return found


def has_bfloat16_units() -> bool:
    """Whether this CPU multiplies in bfloat16 faster than in float32; Linux says so."""
    about = Path("/proc/cpuinfo")
    return about.exists() and not {"avx512_bf16", "amx_bf16"}.isdisjoint(about.read_text(encoding="utf-8").split())


def chosen_dtype(path: str, device: "torch.device | str | None" = None) -> tuple[str, str]:
    """
    The dtype in which a base model computes where none is named, and why. The policy computes in float32.

    Half precision, where it is faster and the LLM is not a tiny one: that of the checkpoint on an accelerator, or
    bfloat16 for a float32 checkpoint; bfloat16 on a CPU with units for it. Everything else is float32.
    """
    config = config_of(path)
    config = config.base_config if config.model_type == tprl_hf.TPRLConfig.model_type else config
    place, own = device_named(device).type, str(config.dtype or "").removeprefix("torch.")
    if place != "cpu" and own in ("float16", "bfloat16"):
        return own, "the checkpoint's own"
    width = config.get_text_config().hidden_size
    if width < WIDE:
        return "float32", f"an LLM {width} wide is fast enough"
    if place != "cpu":
        return "bfloat16", "the checkpoint is float32"
    return ("bfloat16", "this CPU has units for it") if has_bfloat16_units() else ("float32", "a CPU without bfloat16")


def pretrained_arguments(
    device: "torch.device | str | None" = None,
    dtype: str | None = None,
    device_map: str | None = None,
    attn_implementation: str | None = None,
    load_in_4bit: bool = False,
) -> dict[str, Any]:
    """
    What [`load_model`] and the trainers give to `from_pretrained`; see [`load_model`].

    Raises:
        `ValueError`: If this machine has no such device, or `load_in_4bit` lacks its package.
    """
    place = device_named(device)
    arguments: dict[str, Any] = {"dtype": dtype or ("float32" if place.type == "cpu" else "auto")}
    if device_map is not None:
        arguments["device_map"] = device_map
    if attn_implementation is not None:
        arguments["attn_implementation"] = attn_implementation
    if load_in_4bit:
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError("4 bits need bitsandbytes, which is not installed: pip install 'tprl_hf[quantized]'.")
        from transformers import BitsAndBytesConfig

        computes_in = dtype if dtype not in (None, "auto") else "float32" if place.type == "cpu" else "bfloat16"
        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=computes_in
        )
        arguments.setdefault("device_map", {"": place})
    return arguments


def load_model(
    path: str | None = None, device: "torch.device | str | None" = None, **how: Any
) -> tuple["TPRLForConditionalGeneration", Any]:
    """
    A model, ready to answer, and its processor.

    Args:
        path (`str`, *optional*):
            A TPRL checkpoint, or any LVLM, which is wrapped; a directory or a name on the Hub. Defaults to the
            embedded checkpoint.
        device (`torch.device` or `str`, *optional*):
            Where it goes. Defaults to the accelerator, if there is one.
        dtype (`str`, *optional*):
            `"float32"`, `"bfloat16"`, `"float16"`, or `"auto"`, the checkpoint's own. Defaults to what
            [`chosen_dtype`] says.
        device_map (`str`, *optional*):
            Instead of one device, `"auto"` and the like: see [`~transformers.PreTrainedModel.from_pretrained`].
        attn_implementation (`str`, *optional*):
            `"sdpa"`, `"eager"`, `"flash_attention_2"`, ...
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Whether the base model's linear layers get 4 bits, by bitsandbytes (NF4).

    Returns:
        `tuple`: The model in evaluation mode, and its processor.

    Raises:
        `OSError`, `ValueError`: If there is no such checkpoint or device, the checkpoint is damaged, its family is not
            supported, or packages are not installed.
    """
    from safetensors import SafetensorError
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = path or tprl_hf.embedded_checkpoint()
    is_tprl = config_of(path).model_type == tprl_hf.TPRLConfig.model_type
    arguments = pretrained_arguments(device, **{**how, "dtype": how.get("dtype") or chosen_dtype(path, device)[0]})
    model_class = tprl_hf.TPRLForConditionalGeneration
    load = model_class.from_pretrained if is_tprl else model_class.from_base_model
    try:
        model = load(path, **arguments)
    except SafetensorError as error:
        raise ValueError(f"The weights in {path} are truncated or damaged ({error}): download them again.") from error
    except RuntimeError as error:
        if not any(words in str(error) for words in UNFIT_WEIGHTS):  # such as too little memory
            raise
        raise ValueError(
            f"The weights in {path} do not fit its config.json ({error}): download both again."
        ) from error
    processor = load_processor(path)
    if model.config.question_end_ids is None and getattr(processor, "chat_template", None):
        model.read_chat_template(processor)
    if "device_map" not in arguments and not getattr(model, "is_quantized", False):  # else it is in its place
        model.to(device_named(device))
    return model.eval(), processor


def unknown_words(processor: Any, text: str) -> list[str]:
    """
    The words of a question that a model with a small vocabulary cannot read, as the embedded one.

    Args:
        processor ([`ProcessorMixin`]): Of the model.
        text (`str`): The question, without a chat template.

    Returns:
        `list[str]`: Each word once, in the order of the text; empty for tokenizers that can spell any word.
    """
    tokenizer = processor.tokenizer
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    return list(dict.fromkeys(text[start:end] for token, (start, end) in tokens if token == tokenizer.unk_token_id))


def unknown_words_note(processor: Any, text: str) -> str | None:
    """One line that names the words which the model does not know; `None` where it knows all of them."""
    words = unknown_words(processor, text)
    if not words:
        return None
    listed = ", ".join(repr(word) for word in words[:10])
    return (
        f"This model does not know {listed}{', ...' if len(words) > 10 else ''}: its vocabulary has "
        f"{len(processor.tokenizer)} entries. Do not rely on the answer."
    )
