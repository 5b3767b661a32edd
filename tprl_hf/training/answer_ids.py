"""Where an answer ends: of what `generate` writes, and of a reference that a chat template continues a prompt with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StopStringCriteria

from tprl_hf.modeling.modeling_tprl import TPRLForConditionalGeneration


def end_ids(model: TPRLForConditionalGeneration, processor: Any) -> list[int]:
    """The tokens that end an answer."""
    end = model.generation_config.eos_token_id
    return end if isinstance(end, list) else [processor.tokenizer.eos_token_id if end is None else end]


def answer_lengths(
    sequences: Tensor,
    prompt_length: int,
    ends: Sequence[int],
    tokenizer: Any = None,
    stop_strings: str | list[str] | None = None,
) -> list[int]:
    """
    How many tokens each row answers with, up to what ends it and with that. Behind it `generate` fills the row.

    Args:
        sequences (`int64 [B, L + A]`): what `generate` returns, with the prompts.
        prompt_length (`int`): L.
        ends (`list[int]`): tokens that end an answer.
        tokenizer, stop_strings: texts that end one too, as `generate` takes them.
    """
    sequences = sequences.cpu()
    new = sequences[:, prompt_length:]
    is_end = torch.isin(new, torch.tensor(list(ends), dtype=new.dtype))
    if stop_strings:
        stops = StopStringCriteria(tokenizer, stop_strings)
        for place in range(new.shape[1]):
            is_end[:, place] |= stops(sequences[:, : prompt_length + place + 1], None)
    lengths = is_end.long().argmax(1) + 1 if new.shape[1] else new.new_zeros(len(new))
    return torch.where(is_end.any(1), lengths, new.shape[1]).tolist()


def reference_ids(tokenizer: Any, prompt: str, answer: str, tail: str, ends: Sequence[int]) -> list[int]:
    """
    The tokens with which a model would give a reference answer: as they follow the prompt, and one that ends it.

    Args:
        tokenizer: of the processor.
        prompt (`str`): as the chat template writes it.
        answer (`str`): how it goes on with the reference, perhaps behind a space.
        tail (`str`): what it writes behind that. Only a token that ends an answer is taken from it. LLaVA-1.5's
            template, for example, writes a space there, which the model does not say.
        ends (`list[int]`): tokens that end an answer; the first one is taken where the template has none.
    """
    alone = tokenizer(prompt, add_special_tokens=False).input_ids
    ids = tokenizer(prompt + answer, add_special_tokens=False).input_ids
    if ids[: len(alone)] == alone:
        ids = ids[len(alone) :]
    else:  # the prompt's last token would be another one
        ids = tokenizer(answer, add_special_tokens=False).input_ids
    ending = tokenizer(tail, add_special_tokens=False).input_ids if tail else []
    if any(token in ends for token in ids):  # within what the template writes
        return ids[: next(place for place, token in enumerate(ids) if token in ends) + 1]
    return [*ids, next((token for token in ending if token in ends), ends[0])]
