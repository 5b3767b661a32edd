"""What a client may ask: which fields, which budget, messages of which form. Every refusal is one line."""

import json
import math
from dataclasses import dataclass
from typing import Any

from tprl_hf.modeling.budget import Budget, refuse_several

from .images import SentImage, read_url
from .limits import MAX_MESSAGES, MAX_TEXT, Limits, parse_body, refuse

# Fields of the protocol that would change an answer and are not served, but for these values, which ask for nothing.
UNSERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "chat_template_kwargs": (),  # they could name another template, or replace what is passed here
    "frequency_penalty": (0, 0.0),  # transformers would take it for a repetition_penalty, of the prompt's words too
    "function_call": ("none",),
    "functions": ([],),
    "logprobs": (False,),
    "metadata": ({},),
    "modalities": (["text"],),
    "moderation": (),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "presence_penalty": (0, 0.0),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("auto", "none"),
    "tools": ([],),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
# What a number may be: lowest, highest.
NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 100),
    "top_p": (1e-6, 1),
}
COUNTS = ("max_completion_tokens", "max_tokens")
# Of transformers' generation config, what a request may set. Others cost memory or time without a bound.
GENERATION_NUMBERS: dict[str, tuple[float, float]] = {
    "epsilon_cutoff": (0, 1),
    "eta_cutoff": (0, 1),
    "length_penalty": (-10, 10),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
    "temperature": (1e-3, 100),
    "top_p": (1e-6, 1),
    "typical_p": (1e-6, 1),
}
GENERATION_COUNTS = {  # the most
    "max_new_tokens": None,  # as of `max_tokens`
    "min_new_tokens": None,
    "no_repeat_ngram_size": 100,
    "num_beams": 8,
    "top_k": 1000,
}
MAX_BIASES = 300
MAX_STOPS = 16
MAX_STOP_LENGTH = 1_000
MAX_NUM_KEEP = 2**31 - 1
ROLES = ("assistant", "system", "user")
# What OpenAI's `detail` of an image keeps; "auto" is what the server keeps of requests that do not say.
DETAILS: dict[str, dict[str, Any]] = {"auto": {}, "high": {"prune": False}, "low": {"keep_ratio": 1 / 9}}
BUDGET_TYPES: dict[str, tuple[type, ...]] = {
    "keep_ratio": (float, int),
    "num_keep": (int,),
    "threshold": (float, int),
    "prune": (bool,),
}


@dataclass
class Question:
    """
    A request after what is ours was taken out of it.

    Args:
        body (`dict`): What transformers' handler reads, but for the messages.
        messages (`list[dict]`): With a [`SentImage`] as each image.
        images (`list[SentImage]`): Of all messages, in their order.
        text (`str`): Of all messages, one behind the other.
        budget (`dict`): Keyword arguments of `generate`, empty where the request names no budget.
        seed (`int`, *optional*): Of the random numbers, where the answer is drawn.
        stops (`list[str]`): The texts that end the answer.
        timings (`bool`): Whether the answer says what took how long.
        num_pixels (`int`): Of its images, when these were looked at.
    """

    body: dict[str, Any]
    messages: list[dict[str, Any]]
    images: list[SentImage]
    text: str
    budget: dict[str, Any]
    seed: int | None
    stops: list[str]
    timings: bool
    num_pixels: int = 0


def read_question(content: bytes | bytearray, limits: Limits) -> Question:
    """
    A request, read.

    Raises:
        `HTTPException`: 400 for whatever is not of the protocol's form, would be ignored, or exceeds a limit.
    """
    body = parse_body(content)
    refuse_unserved(body)
    check_lengths(body, limits)
    if body.get("generation_config") is not None:
        body["generation_config"] = json.dumps(read_generation_config(body["generation_config"], limits))
    if body.get("logit_bias") is not None:
        body["logit_bias"] = read_biases(body["logit_bias"]) or None  # transformers refuses an empty one
    budget, seed, stops = take_budget(body), take_seed(body), take_stops(body)
    timings = body.pop("timings", None) or False
    messages = read_messages(body.pop("messages", None), limits)
    parts = [part for message in messages if isinstance(message["content"], list) for part in message["content"]]
    images = [part["image_url"] for part in parts if part["type"] == "image_url"]
    if len(images) > limits.max_images:
        raise refuse(f"The request has {len(images)} images; at most {limits.max_images} are read.")
    text = texts_of(messages)
    if len(text) > MAX_TEXT:
        raise refuse(f"The messages have {len(text):,} characters; at most {MAX_TEXT:,} are read.")
    details = {image.detail for image in images}
    if len(details) > 1:
        raise refuse(f"The images of a request have one detail; got {', '.join(sorted(details))}.")
    detail_budget = DETAILS[details.pop()] if details else {}
    if budget and detail_budget:
        raise refuse(f"Pass a detail other than auto, or {next(iter(budget))}, not both.")
    return Question(body, messages, images, text, budget or detail_budget, seed, stops, timings)


def shown(value: Any) -> str:
    """A value of a request as a message shows it."""
    return json.dumps(value)[:80]


def refuse_unserved(body: dict[str, Any]) -> None:
    """
    Raises:
        `HTTPException`: 400 for a field that would be ignored, or that is of another type than the protocol's.
    """
    for name, harmless in UNSERVED.items():
        value = body.pop(name, None)
        if value is not None and not any(value == one and type(value) is type(one) for one in harmless):
            raise refuse(f"{name}={shown(value)} is not served: leave it out.")
    for name, bounds in NUMBERS.items():
        check_number(name, body.get(name), bounds)
    for name, kind in (("model", str), ("stream", bool), ("timings", bool), ("user", str)):
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise refuse(f"{name} must be {kind.__name__}; got {shown(body[name])}.")
    options = body.pop("stream_options", None)
    if options is not None and (not isinstance(options, dict) or not set(options) <= {"include_usage"}):
        raise refuse(f"stream_options is an object with include_usage; got {shown(options)}. Usage is always sent.")


def check_number(name: str, value: Any, bounds: tuple[float, float]) -> None:
    if value is None:
        return
    if type(value) not in (int, float) or not math.isfinite(value):
        raise refuse(f"{name} must be a number; got {shown(value)}.")
    if not bounds[0] <= value <= bounds[1]:
        raise refuse(f"{name} lies from {bounds[0]:g} to {bounds[1]:g}; got {shown(value)}.")


def check_count(name: str, value: Any, most: int) -> None:
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise refuse(f"{name} is a whole number from 1 to {most}; got {shown(value)}.")


def check_lengths(body: dict[str, Any], limits: Limits) -> None:
    for name in COUNTS:
        check_count(name, body.get(name), limits.max_tokens)


def read_generation_config(given: Any, limits: Limits) -> dict[str, Any]:
    """
    The settings of a request's `generation_config`.

    Raises:
        `HTTPException`: 400 for anything but a text that holds a JSON object, for settings that are not served, and
            values out of their range.
    """
    wrong = "generation_config must be a text that holds a JSON object"
    if not isinstance(given, str):
        raise refuse(f"{wrong}; got {shown(given)}.")
    try:
        settings = parse_body(given.encode("utf-8", "surrogatepass"))
    except Exception as error:
        raise refuse(f"{wrong}; got {shown(given)}.") from error
    for name, value in settings.items():
        if name in GENERATION_NUMBERS:
            check_number(name, value, GENERATION_NUMBERS[name])
        elif name in GENERATION_COUNTS:
            check_count(name, value, GENERATION_COUNTS[name] or limits.max_tokens)
        elif name == "do_sample":
            if not isinstance(value, bool | None):
                raise refuse(f"do_sample must be bool; got {shown(value)}.")
        elif name == "stop_strings":
            read_stops(name, value)
        else:
            served = ", ".join(sorted([*GENERATION_NUMBERS, *GENERATION_COUNTS, "do_sample", "stop_strings"]))
            raise refuse(f"generation_config sets {shown(name)}, which is not served. Served are {served}.")
    return settings


def read_biases(given: Any) -> dict[str, float]:
    """`logit_bias` with floats. Raises `HTTPException` 400 for anything but numbers from -100 to 100 for token ids."""
    if not isinstance(given, dict) or len(given) > MAX_BIASES:
        raise refuse(f"logit_bias is an object with at most {MAX_BIASES} token ids; got {shown(given)}.")
    for token, bias in given.items():
        if not (token.isascii() and token.isdigit() and len(token) < 10):
            raise refuse(f"logit_bias names the token {shown(token)}; a token id is a whole number.")
        check_number(f"logit_bias of {token}", -101 if bias is None else bias, (-100, 100))
    return {token: float(bias) for token, bias in given.items()}


def read_stops(name: str, given: Any) -> list[str]:
    """
    The texts that end an answer.

    Raises:
        `HTTPException`: 400 for anything but a text, or a short list of texts, of at least one character.
    """
    stops = [] if given is None else [given] if isinstance(given, str) else given
    if not isinstance(stops, list) or not all(isinstance(stop, str) and stop for stop in stops):
        raise refuse(f"{name} is a text, or a list of texts, none of them empty; got {shown(given)}.")
    if len(stops) > MAX_STOPS or any(len(stop) > MAX_STOP_LENGTH for stop in stops):
        raise refuse(f"{name} has at most {MAX_STOPS} texts of at most {MAX_STOP_LENGTH:,} characters.")
    return stops


def take_stops(body: dict[str, Any]) -> list[str]:
    """Takes `stop` out of a request; see [`read_stops`]."""
    return read_stops("stop", body.pop("stop", None))


def take_seed(body: dict[str, Any]) -> int | None:
    """Takes `seed` out of a request. Raises `HTTPException` 400 for anything but a whole number of 64 bits."""
    seed = body.pop("seed", None)
    if seed is not None and (type(seed) is not int or not -(2**63) <= seed < 2**64):
        raise refuse(f"seed is a whole number of 64 bits; got {shown(seed)}.")
    return seed


def take_budget(body: dict[str, Any]) -> dict[str, Any]:
    """
    Takes `keep_ratio`, `num_keep`, `threshold` or `prune` out of a request.

    Returns:
        `dict`: Keyword arguments of `generate`, empty where the request names no budget. `"prune": true` names none.

    Raises:
        `HTTPException`: 400 when it names several, or one that is none.
    """
    budget = {name: body.pop(name) for name in BUDGET_TYPES if name in body}
    budget = {name: value for name, value in budget.items() if value is not None}
    for name, value in budget.items():
        if not isinstance(value, BUDGET_TYPES[name]) or (isinstance(value, bool) and name != "prune"):
            kinds = " or ".join(kind.__name__ for kind in BUDGET_TYPES[name])
            raise refuse(f"{name} must be {kinds}; got {repr(value)[:80]}.")
        if name != "prune":
            check_number(name, value, (-MAX_NUM_KEEP, MAX_NUM_KEEP))
    try:
        refuse_several(budget)
        if budget and "prune" not in budget:
            Budget(**budget)
    except ValueError as error:
        raise refuse(str(error)) from None
    return {} if budget.get("prune") else budget


def read_messages(messages: Any, limits: Limits) -> list[dict[str, Any]]:
    """
    Chat messages whose images are found, but not opened.

    Args:
        messages (`list[dict]`): As a client sent them: each with a `role`, and a text or parts as `content`.
        limits ([`Limits`]): Whether images may come from afar.

    Returns:
        `list[dict]`: The same, with a [`SentImage`] as each image.

    Raises:
        `HTTPException`: 400 for messages of another form, other parts than texts and images, and images that are not
        to be had.
    """
    if not isinstance(messages, list) or not messages:
        raise refuse("`messages` must be a list with at least one message.")
    if len(messages) > MAX_MESSAGES:
        raise refuse(f"The request has {len(messages):,} messages; at most {MAX_MESSAGES:,} are read.")
    return [read_message(message, limits) for message in messages]


def texts_of(messages: list[dict[str, Any]]) -> str:
    """All texts of messages that were read, one behind the other."""
    texts: list[str] = []
    for message in messages:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts += [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts)


def read_message(message: Any, limits: Limits) -> dict[str, Any]:
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise refuse("A message must be an object with a `role`.")
    if message["role"] not in ROLES:
        raise refuse(f"The role of a message is one of {', '.join(ROLES)}; got {shown(message['role'])}.")
    # clients send answers back with all their fields, most of them empty
    others = [name for name, value in message.items() if name not in ("role", "content") and value not in (None, [])]
    if others:
        raise refuse(f"A message has a `role` and a `content`; {shown(others[0])} is not served.")
    content = message.get("content")
    if content is None:
        content = ""
    if isinstance(content, str):
        return {"role": message["role"], "content": readable(content)}
    if not isinstance(content, list):
        raise refuse(f"The `content` of a message is a text or a list of parts; got {type(content).__name__}.")
    if len(content) > MAX_MESSAGES:
        raise refuse(f"A message has {len(content):,} parts; at most {MAX_MESSAGES:,} are read.")
    return {"role": message["role"], "content": [read_part(part, limits) for part in content]}


def read_part(part: Any, limits: Limits) -> dict[str, Any]:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": readable(part["text"])}
    if kind == "image_url":
        given = part.get("image_url")
        given = given if isinstance(given, dict) else {"url": given}
        if isinstance(given.get("url"), str):
            image = read_url(given["url"], limits)
            image.detail = read_detail(given)
            return {"type": "image_url", "image_url": image}
    raise refuse(
        'A part is {"type": "text", "text": ...} or {"type": "image_url", "image_url": {"url": ...}}; got one of '
        f"type {repr(kind)[:80]}."
    )


def read_detail(image_url: dict[str, Any]) -> str:
    """The `detail` of an image. Raises `HTTPException` 400 for one that is not served, and for other fields."""
    others = sorted(set(image_url) - {"url", "detail"})
    if others:
        raise refuse(f"An image_url has a url and a detail; {shown(others[0])} is not served.")
    detail = "auto" if image_url.get("detail") is None else image_url["detail"]
    if not isinstance(detail, str) or detail not in DETAILS:
        raise refuse(f"detail is one of {', '.join(DETAILS)}; got {shown(detail)}.")
    return detail


def readable(text: str) -> str:
    """A text. Raises `HTTPException` 400 where it holds half a character (a lone surrogate)."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise refuse(f"A text cannot be read at character {error.start}: it holds half a character.") from None
    return text
