"""From a question to the inputs of the model. Everything that takes long in it runs in a thread of its own."""

import sys
from typing import Any

from jinja2 import TemplateError
from transformers.cli.serving.utils import BaseHandler, Modality

from tprl_hf.loading import unknown_words_note

from .chat_requests import Question
from .limits import refuse

MAX_NOTE = 300  # characters


class PreparedProcessor:
    """
    The processor for transformers' handler, for a request whose inputs are there already.

    Args:
        processor ([`ProcessorMixin`]): The model's.
        inputs ([`BatchFeature`]): What its chat template gives for the messages of the request.
    """

    def __init__(self, processor: Any, inputs: Any):
        self.processor = processor
        self.inputs = inputs

    def apply_chat_template(self, messages: Any, **kwargs: Any) -> Any:
        return self.inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.processor, name)


def prepare(question: Question, model: Any, processor: Any, request_id: str) -> Any:
    """
    Opens the images of a question, and lets the processor make the model's inputs of it.

    Args:
        question ([`Question`]): With images that were fetched.
        model ([`TPRLForConditionalGeneration`]): Where the inputs go.
        processor ([`ProcessorMixin`]): Its processor.
        request_id (`str`): What the log calls the request.

    Returns:
        `BatchFeature`: `input_ids` int64 [1, L] and what else the model reads.

    Raises:
        `HTTPException`: 400 for what the template or the processor cannot take, and for a prompt longer than the
            model has positions.
    """
    note = unknown_words_note(processor, question.text)
    if note is not None:
        print(f"{request_id}: {note[:MAX_NOTE]}", file=sys.stderr, flush=True)
    for message in question.messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] == "image_url":
                    part["image_url"] = part["image_url"].open()
    try:
        inputs = processor.apply_chat_template(
            BaseHandler.get_processor_inputs_from_messages(question.messages, Modality.VLM),
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
            tokenize=True,
        )
    except (ValueError, OSError, TypeError, LookupError, TemplateError) as error:
        # a placeholder without its image, or roles in an order that the template refuses
        raise refuse("The messages cannot be made into a prompt: " + " ".join(str(error).split())) from error
    finally:
        for message in question.messages:  # decoded images are large, and nobody looks at them again
            message["content"] = ""
    length, positions = inputs["input_ids"].shape[-1], num_positions(model)
    if positions is not None and length >= positions:
        raise refuse(
            f"The prompt has {length:,} tokens, and the model {positions:,} positions: send fewer or smaller images, "
            "or less text. Pruned tokens count, because they keep their positions."
        )
    return inputs.to(model.device)


def num_positions(model: Any) -> int | None:
    """How many tokens prompt and answer may have together; `None` for a model that does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def answer_length(asked: int | None, default: int, prompt_length: int, positions: int | None) -> int:
    """
    The longest answer to a prompt.

    Args:
        asked (`int`, *optional*): Tokens that the request asks for.
        default (`int`): Tokens of an answer to a request that does not say.
        prompt_length (`int`): Tokens of the prompt.
        positions (`int`, *optional*): Of the model.

    Raises:
        `HTTPException`: 400 where the request asks for more than the model has positions left.
    """
    wanted = default if asked is None else asked
    if positions is None:
        return wanted
    left = positions - prompt_length
    if asked is not None and asked > left:
        raise refuse(
            f"The prompt has {prompt_length:,} tokens and the model {positions:,} positions, so an answer has at most "
            f"{left:,} tokens; got max_tokens={asked:,}."
        )
    return min(wanted, left)
