"""Making pruned generation look like that of the full prompt: lengths, processors, criteria, streamers."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PrefixConstrainedLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from .columns import restore_prompt

# Arguments of `generate` for one answer of the likeliest tokens, whatever the checkpoint's generation config says.
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
}

# Attributes of the library's own processors and criteria that count the prompt.
_LENGTHS = (
    "min_length",
    "max_length",
    "prompt_length_to_skip",
    "prompt_ignore_length",
    "regulation_start",
    "begin_index",
)


class _SeesOriginalPrompt(LogitsProcessor):
    """Shows a user's logits processor the original prompt in place of the pruned one."""

    def __init__(self, processor: LogitsProcessor, prompt: Tensor, pruned_length: int):
        self.processor, self.prompt, self.pruned_length = processor, prompt, pruned_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return self.processor(restore_prompt(input_ids, self.prompt, self.pruned_length), scores)


class _StopsOnOriginalPrompt(StoppingCriteria):
    """Shows a user's stopping criterion the original prompt in place of the pruned one."""

    def __init__(self, criterion: StoppingCriteria, prompt: Tensor, pruned_length: int):
        self.criterion, self.prompt, self.pruned_length = criterion, prompt, pruned_length

    def __getattr__(self, name: str) -> Any:  # `generate` asks which criteria have an `eos_token_id`
        if name == "criterion":  # while it is copied
            raise AttributeError(name)
        return getattr(self.criterion, name)

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return self.criterion(restore_prompt(input_ids, self.prompt, self.pruned_length), scores, **kwargs)


class _StreamsOriginalPrompt(BaseStreamer):
    """Puts the original prompt into a user's streamer first."""

    def __init__(self, streamer: BaseStreamer, prompt: Tensor):
        self.streamer, self.prompt = streamer, prompt
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        self.streamer.put(self.prompt.cpu() if self.is_prompt else value)
        self.is_prompt = False

    def end(self) -> None:
        self.streamer.end()


def counting_pruned(given: Any, length: int, pruned_length: int) -> Any:
    """
    A processor or criterion of the library's own, whose lengths count the pruned prompt; `None` for any other.

    `generate` leaves out its own where a user passes one of just its type, so that the type must stay. It sees what
    the one left out would have seen: the pruned prompt.
    """
    library = (LogitsProcessor.__module__, StoppingCriteria.__module__)
    if type(given).__module__ not in library or isinstance(given, PrefixConstrainedLogitsProcessor):
        return None
    lengths = {name: getattr(given, name) for name in _LENGTHS if getattr(given, name, None) is not None}
    ignored = lengths.get("prompt_ignore_length")
    if ignored is not None and bool((torch.as_tensor(ignored) < length).any()):
        return None  # it ends within the prompt, where pruning moves columns
    if not lengths or length == pruned_length:
        return given
    given = copy.copy(given)
    for name, value in lengths.items():
        setattr(given, name, value - length + pruned_length)
    return given


def wrap_for_original_prompt(kwargs: dict[str, Any], prompt: Tensor, pruned_length: int) -> None:
    """Wraps, in place, what the user passed to `generate` and what looks at the prompt."""
    length = prompt.shape[1]
    if kwargs.get("logits_processor") is not None:
        kwargs["logits_processor"] = LogitsProcessorList(
            counting_pruned(p, length, pruned_length) or _SeesOriginalPrompt(p, prompt, pruned_length)
            for p in kwargs["logits_processor"]
        )
    if kwargs.get("stopping_criteria") is not None:
        given = kwargs["stopping_criteria"]
        criteria = [given] if isinstance(given, StoppingCriteria) else given
        kwargs["stopping_criteria"] = StoppingCriteriaList(
            counting_pruned(c, length, pruned_length) or _StopsOnOriginalPrompt(c, prompt, pruned_length)
            for c in criteria
        )
    if kwargs.get("prefix_allowed_tokens_fn") is not None:
        allowed: Callable[[int, Tensor], list[int]] = kwargs["prefix_allowed_tokens_fn"]

        def allowed_after_original(batch_id: int, ids: Tensor) -> list[int]:
            return allowed(batch_id, restore_prompt(ids[None], prompt[batch_id : batch_id + 1], pruned_length)[0])

        kwargs["prefix_allowed_tokens_fn"] = allowed_after_original
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _StreamsOriginalPrompt(kwargs["streamer"], prompt)


def setting(name: str, kwargs: dict[str, Any], *configs: GenerationConfig | None) -> Any:
    """A generation setting by `generate`'s precedence: the call, its config, the model's config."""
    for value in (kwargs.get(name), *(getattr(config, name, None) for config in configs if config is not None)):
        if value is not None:
            return value
    return None


def padding_of(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> tuple[int | None, list[int]]:
    """The padding token of a call of `generate`, and the tokens that end its answers."""
    pad, ends = (setting(name, kwargs, *configs) for name in ("pad_token_id", "eos_token_id"))
    return None if pad is None else int(pad), [] if ends is None else torch.as_tensor(ends).flatten().tolist()


def filler_of_answers(kwargs: dict[str, Any], *configs: GenerationConfig | None) -> int | None:
    """What `generate` writes behind answers that end before others; `None` where none ends."""
    pad, ends = padding_of(kwargs, *configs)
    return ends[0] if pad is None and ends else pad


def convert_lengths(
    kwargs: dict[str, Any],
    generation_config: GenerationConfig | None,
    model_config: GenerationConfig,
    length: int,
    pruned_length: int,
) -> GenerationConfig | None:
    """Makes `max_length` and `min_length`, which count the original prompt, count the pruned one.

    Changes `kwargs` in place where the setting is there; returns the config to pass on.

    Raises:
        `ValueError`: when the original prompt is already as long as `max_length`.
    """
    converted: dict[str, int] = {}
    max_length = setting("max_length", kwargs, generation_config, model_config)
    if max_length is not None and setting("max_new_tokens", kwargs, generation_config, model_config) is None:
        if max_length <= length:
            raise ValueError(
                f"The prompt has {length} tokens, but max_length={max_length}: it counts the prompt with all its "
                "visual tokens. Raise it or pass max_new_tokens."
            )
        converted["max_length"] = max_length - length + pruned_length
    min_length = setting("min_length", kwargs, generation_config, model_config)
    if min_length and setting("min_new_tokens", kwargs, generation_config, model_config) is None:
        converted["min_length"] = max(min_length - length + pruned_length, 0)
    if generation_config is not None and converted:
        generation_config = copy.deepcopy(generation_config)
        for name, value in converted.items():
            kwargs.pop(name, None)
            setattr(generation_config, name, value)
    else:
        kwargs.update(converted)
    return generation_config
