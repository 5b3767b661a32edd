"""Which tokens of a prompt are the user's question.

The policy reads the question's word embeddings. A question ends at the last generation prompt, whether its answer
follows or not. Exact question tokens come from the processor ([`question_mask`]); where only ids are known, the config
says what the chat template puts around a question ([`default_query_mask`]).
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .values import wrong


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


def default_query_mask(
    input_ids: Tensor,
    attention_mask: Tensor,
    visual: Tensor,
    special_ids: list[int],
    start_ids: list[int] | None = None,
    end_ids: list[int] | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """
    The question, where only ids are known: attended tokens that are neither visual nor special, of the last turn.

    It begins behind the last `start_ids` and ends where the last `end_ids` begin: at the last generation prompt. What
    follows is the answer, so that a prompt has the same question while it is answered and while its answer is scored.

    Args:
        input_ids, attention_mask (`int64 [B, L]`), visual (`bool [B, L]`): the prompts, and their placeholders.
        special_ids (`list[int]`): ids that are never part of a question.
        start_ids, end_ids (`list[int]`, *optional*): what a chat template puts around the last question, see
            [`template_ids`]. Without them, or where they are not found, the question is not bounded on that side.
        labels (`int64 [B, L]`, *optional*): a token with a label other than -100 is not part of the question, unless
            all of the question has labels.

    Returns:
        `bool [B, L]`
    """
    special = torch.isin(input_ids, torch.tensor(special_ids, device=input_ids.device, dtype=input_ids.dtype))
    question = attention_mask.bool() & ~visual & ~special & (input_ids >= 0)  # less: a column without a token
    columns = torch.arange(input_ids.shape[1], device=input_ids.device)
    end = last_occurrence(input_ids, end_ids, input_ids.shape[1])
    before_end = columns < end[:, None]
    question &= before_end
    if start_ids:
        start = last_occurrence(input_ids.masked_fill(~before_end, -1), start_ids, -len(start_ids)) + len(start_ids)
        question &= columns >= start[:, None]
    if labels is not None:
        unlabelled = question & (labels.to(question.device) == -100)
        question = torch.where(unlabelled.any(1, keepdim=True), unlabelled, question)
    return question


def last_occurrence(input_ids: Tensor, pattern: list[int] | None, otherwise: int) -> Tensor:
    """Column where the last `pattern` in each row of `input_ids [B, L]` begins, `int64 [B]`."""
    num_rows, length = input_ids.shape
    if not pattern or len(pattern) > length:
        return torch.full((num_rows,), otherwise, device=input_ids.device)
    windows = input_ids.unfold(1, len(pattern), 1)
    found = (windows == torch.tensor(pattern, device=input_ids.device)).all(-1)
    last = found.shape[1] - 1 - found.flip(1).long().argmax(1)
    return torch.where(found.any(1), last, otherwise)


def template_ids(processor: Any) -> tuple[list[int], list[int]]:
    """
    What a chat template puts before the text of a user's turn, and after the last one.

    Args:
        processor: the base model's processor, or its tokenizer, with a chat template.

    Returns:
        Two lists of token ids: the end of what stands before a question in any turn, and all that stands between the
        last question and the answer, with the generation prompt.
    """
    tokenizer = getattr(processor, "tokenizer", processor)

    def render(question: str, earlier: bool) -> list[int]:
        turns = [("user", "Hello"), ("assistant", "Yes")] if earlier else []
        chat = [
            {"role": role, "content": [{"type": "text", "text": text}]} for role, text in [*turns, ("user", question)]
        ]
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    # so different that tokens in which template and question have merged are not taken for the template's
    questions = ("What", "Is it red?", "how many", "7", "the cat", "a dog", "in", "please")
    first, later = ([render(question, earlier) for question in questions] for earlier in (False, True))
    before = [common_prefix(rows) for rows in (first, later)]
    end = common_prefix([row[::-1] for row in first])[::-1]
    return common_prefix([row[::-1] for row in before])[::-1], end


def common_prefix(rows: list[list[int]]) -> list[int]:
    """The longest list with which all of `rows` begin."""
    shortest = min(map(len, rows))
    length = next((i for i in range(shortest) if len({row[i] for row in rows}) > 1), shortest)
    return rows[0][:length]


def chat_messages(prompt: str | list[dict[str, Any]], num_images: int) -> list[dict[str, Any]]:
    """
    The chat messages of a sample, whose texts are parts, as templates of processors read them.

    Args:
        prompt (`str` or `list[dict]`): a question, or messages. Where no message says where the images are, as in
            rows for TRL, they stand before the first text of the user.
        num_images (`int`): of the sample.

    Raises:
        `ValueError`: for what is neither a question nor chat messages.
    """
    messages = messages_of(prompt)
    parts = [[filled(part) for part in text_parts(message["content"])] for message in messages]
    if not any(part["type"] == "image" for content in parts for part in content):
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is not None:
            parts[first] = [*({"type": "image"} for _ in range(num_images)), *parts[first]]
    return [{**filled(message), "content": content} for message, content in zip(messages, parts, strict=True)]


def special_tokens(processor: Any, texts: list[str]) -> dict[str, bool]:
    """What a processor is told beside rendered chats: where the template writes the first token itself, as Gemma's
    does, a second one would follow. transformers' own `apply_chat_template` does the same."""
    first = processor.tokenizer.bos_token
    return {"add_special_tokens": False} if first and texts and texts[0].startswith(first) else {}


def filled(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A message or a part without what is `None`: datasets fill rows so, and templates ask which fields are there."""
    return {name: value for name, value in fields.items() if value is not None}


def messages_of(prompt: Any) -> list[dict[str, Any]]:
    """The chat messages of a prompt, of which a question is one; what is no message is refused."""
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, (list, tuple)):
        raise wrong("prompt", prompt, "a question, or a list of chat messages")
    for index, message in enumerate(prompt):
        if not is_message(message):
            raise wrong(
                f"prompt[{index}]", message, "a dict with `role` and `content`, a text or a list of parts",
                "Of {'from': 'human', 'value': TEXT} make {'role': 'user', 'content': TEXT}.",
            )  # fmt: skip
    return list(prompt)


def is_message(message: Any) -> bool:
    """Whether it has a role, and a text or parts with their types."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        return False
    content = message.get("content")
    return isinstance(content, str) or (isinstance(content, (list, tuple)) and all(map(is_part, content)))


def is_part(part: Any) -> bool:
    """Whether it has a type, and one of text its text."""
    is_typed = isinstance(part, Mapping) and isinstance(part.get("type"), str)
    return is_typed and (part["type"] != "text" or isinstance(part.get("text"), str))


def question_of(prompt: str | list[dict[str, Any]]) -> str:
    """The text of a prompt's last message of the user."""
    if isinstance(prompt, str):
        return prompt
    content = next((one["content"] for one in reversed(messages_of(prompt)) if one["role"] == "user"), "")
    return " ".join(part["text"] for part in text_parts(content) if part["type"] == "text")


def text_parts(content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The parts of a message, of which a plain string is one."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def question_mask(
    processor: Any, conversations: list[list[dict[str, Any]]], input_ids: Tensor, attention_mask: Tensor | None = None
) -> Tensor:
    """Exactly the words of each conversation's last question, also where images lie between them.

    The chat is rendered with and without each of the question's texts; what differs are its tokens. They are then
    found in the prompt, where placeholders of images may have become many. A question may be without words.

    Args:
        processor: the base model's processor, or its tokenizer, with a chat template.
        conversations: chat messages of each sample, as given to `apply_chat_template`.
        input_ids (`int64 [B, L]`): what the processor made of them, with `add_generation_prompt=True`.
        attention_mask (`int64 [B, L]`, *optional*): 0 for padding.

    Returns:
        `bool [B, L]`, to be passed as `query_mask`.

    Raises:
        `ValueError`: where the tokens of a question are not in the prompt.
    """
    mask = torch.zeros_like(input_ids, dtype=torch.bool)
    for row, messages in enumerate(conversations):
        full, texts = _question_tokens(processor, messages)
        ids = input_ids[row].tolist()
        end = len(ids) if attention_mask is None else int(attention_mask[row].nonzero().max()) + 1
        after = len(full)
        for start, stop in reversed(texts):
            # placeholders between here and there may have become more, not fewer
            tokens, end = full[start:stop], end - (after - stop)
            place = next((p for p in range(end - len(tokens), -1, -1) if ids[p : p + len(tokens)] == tokens), None)
            if place is None:
                raise ValueError(
                    f"The question of sample {row}, {len(tokens)} tokens, is not in its prompt: build input_ids from "
                    "the same conversation, with the same processor and add_generation_prompt=True."
                )
            mask[row, place : place + len(tokens)] = True
            end, after = place, start
    return mask


def _question_tokens(processor: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a conversation, and where in them the texts of its last question begin and end."""
    tokenizer = getattr(processor, "tokenizer", processor)

    def render(chat: list[dict[str, Any]]) -> list[int]:
        text = processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    full = render(messages)
    texts: list[tuple[int, int]] = []
    for without in _without_each_text(messages):
        bare = render(without)
        first = texts[-1][1] if texts else 0
        start = next(
            (i for i, (a, b) in enumerate(zip(full, bare, strict=False)) if a != b), min(len(full), len(bare))
        )
        most = min(len(bare), len(full)) - start
        after = next((i for i in range(most) if full[-1 - i] != bare[-1 - i]), most)
        start, stop = max(start, first), len(full) - after
        if start < stop:
            texts.append((start, stop))
    return full, texts


def _without_each_text(messages: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    """The conversation without each of its last question's texts in turn."""
    last = max((i for i, message in enumerate(messages) if message["role"] == "user"), default=None)
    if last is None:
        return
    content = messages[last]["content"]
    if isinstance(content, str):
        emptied: list[Any] = [""]
    else:
        emptied = [
            [{**part, "text": ""} if other is part else other for other in content]
            for part in content
            if part["type"] == "text"
        ]
    for one in emptied:
        yield [*messages[:last], {**messages[last], "content": one}, *messages[last + 1 :]]
