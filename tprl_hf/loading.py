"""A model and its processor by the name that users write. The function imports torch, this module does not."""

from typing import TYPE_CHECKING, Any

import tprl_hf

if TYPE_CHECKING:
    import torch

    from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration


def load_model(
    path: str | None = None, device: "torch.device | str | None" = None
) -> tuple["TPRLForConditionalGeneration", Any]:
    """
    A model, ready to answer, and its processor.

    Args:
        path (`str`, *optional*):
            A TPRL checkpoint, or any LVLM, which is wrapped; a directory or a name on the Hub. Defaults to the
            embedded checkpoint.
        device (`torch.device` or `str`, *optional*):
            Where it goes. Defaults to the accelerator, if there is one.

    Returns:
        `tuple`: The model in evaluation mode, in float32 on the CPU or in the checkpoint's own dtype on an
        accelerator, and its processor.

    Raises:
        `OSError`, `ValueError`: If there is no such checkpoint, it is damaged, its family is not supported, or its
            processor needs packages that are not installed.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoConfig
    from transformers.utils import logging

    from tprl_hf.missing_packages import load_processor

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    path = path or tprl_hf.embedded_checkpoint()
    if device is None:
        device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device(device or "cpu")
    dtype = torch.float32 if device.type == "cpu" else "auto"
    model_class = tprl_hf.TPRLForConditionalGeneration
    is_ours = AutoConfig.from_pretrained(path).model_type == tprl_hf.TPRLConfig.model_type
    load = model_class.from_pretrained if is_ours else model_class.from_base_model
    try:
        model = load(path, dtype=dtype)
    except SafetensorError as error:
        raise ValueError(f"The weights in {path} are truncated or damaged ({error}): download them again.") from error
    except RuntimeError as error:
        raise ValueError(
            f"The weights in {path} do not fit its config.json ({error}): download both again."
        ) from error
    processor = load_processor(path)
    if model.config.question_end_ids is None and getattr(processor, "chat_template", None):
        model.read_chat_template(processor)
    return model.to(device).eval(), processor


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
