"""Which tokens of a prompt are the user's question.

The policy reads the question's word embeddings. Exact question tokens come from the processor ([`question_mask`]);
without them the fallback takes all attended tokens that are neither visual nor special.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig


def special_token_ids(*configs: Any) -> list[int]:
    """All ids that the configs name as `..._token_id` or `..._token_index`."""
    ids: set[int] = set()
    for config in configs:
        for name, value in config.to_dict().items():
            if name.endswith(("_token_id", "_token_index")) and value is not None:
                ids.update(value if isinstance(value, Iterable) else [value])
    return sorted(i for i in ids if isinstance(i, int))


def config_special_ids(config: PreTrainedConfig, generation_config: Any) -> list[int]:
    """Special ids of an LVLM, as far as its config, text config and generation config tell."""
    return special_token_ids(config, config.get_text_config(), generation_config)


def default_query_mask(input_ids: Tensor, attention_mask: Tensor, visual: Tensor, special_ids: list[int]) -> Tensor:
    """The fallback: attended tokens that are neither visual nor special, `bool [B, L]`."""
    special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device, dtype=input_ids.dtype))
    return attention_mask.bool() & ~visual & ~special


def chat_messages(prompt: str | list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """The chat messages of a sample: `prompt` itself where it is messages, else one question behind its images."""
    if not isinstance(prompt, str):
        return prompt
    content: list[dict[str, Any]] = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt}]}]


def question_mask(
    processor: Any, conversations: list[list[dict[str, Any]]], input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Exactly the tokens of each conversation's last question.

    The chat is rendered with and without the question; what lies between their common beginning and end is the
    question. Its tokens are then found in the prompt, where placeholders of images may have become many.

    Args:
        processor: the base model's processor, or its tokenizer, with a chat template.
        conversations: chat messages of each sample, as given to `apply_chat_template`.
        input_ids (`int64 [B, L]`): what the processor made of them, with `add_generation_prompt=True`.
        attention_mask (`int64 [B, L]`, *optional*): 0 for padding.

    Returns:
        `bool [B, L]`, to be passed as `query_mask`.

    Raises:
        `ValueError`: where a conversation has no question, or its tokens are not in the prompt.
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, messages in enumerate(conversations):
        question, after = _question_tokens(processor, messages)
        ids = input_ids[row].tolist()
        last = len(ids) if attention_mask is None else int(attention_mask[row].nonzero().max()) + 1
        # where nothing between question and end was expanded this is the place, otherwise it is the last occurrence
        places = [last - after - len(question), *range(last - len(question), -1, -1)]
        start = next((p for p in places if p >= 0 and ids[p : p + len(question)] == question), None)
        if start is None:
            raise ValueError(
                f"The question of sample {row}, {len(question)} tokens, is not in its prompt: build input_ids from "
                "the same conversation, with the same processor and add_generation_prompt=True."
            )
        mask[row, start : start + len(question)] = True
    return mask


def _question_tokens(processor: Any, messages: list[dict[str, Any]]) -> tuple[list[int], int]:
    """Token ids of the last question, and how many tokens come after it."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        raise ValueError("The conversation has no message with role 'user', so there is no question.")
    without = [dict(message) for message in messages]
    content = without[last]["content"]
    if isinstance(content, str):
        without[last]["content"] = ""
    else:
        without[last]["content"] = [{**part, "text": ""} if part["type"] == "text" else part for part in content]
    tokenizer = getattr(processor, "tokenizer", processor)
    rendered = [
        tokenizer(
            processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True), add_special_tokens=False
        )["input_ids"]
        for chat in (messages, without)
    ]
    full, bare = rendered
    before = next((i for i, (a, b) in enumerate(zip(full, bare, strict=False)) if a != b), len(bare))
    most = len(bare) - before
    after = next((i for i in range(most) if full[-1 - i] != bare[-1 - i]), most)
    question = full[before : len(full) - after]
    if not question:
        raise ValueError("The last message with role 'user' has no text, so there is no question.")
    return question, after
