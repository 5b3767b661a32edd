"""Where an answer ends: at a text that the client named, or at once, when the client has left."""

import asyncio
import threading
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .limits import refuse


class AnswerEnd:
    """
    What ends one answer.

    Args:
        stops (`list[str]`): The answer ends before the first of them.

    Attributes:
        client_left (`threading.Event`): Set when nobody waits for the answer any more.
        server_ends (`threading.Event`): Set when the server cannot wait for the answer any more.
        generated (`asyncio.Event`): Set when the model has made its last token, and all about it is known.
        found (`bool`): Whether one of the texts has come.
        is_whole (`bool`): Whether the model ended the answer itself.
        error (`Exception`, *optional*): What happened instead of an answer.
    """

    def __init__(self, stops: list[str]):
        self.stops = stops
        self.client_left = threading.Event()
        self.server_ends = threading.Event()
        self.generated = asyncio.Event()
        self.found = self.is_whole = False
        self.error: Exception | None = None

    def is_late(self) -> bool:
        return self.client_left.is_set() or self.server_ends.is_set()

    def refuse_late(self) -> None:
        """Raises `HTTPException` 503 where the answer would come too late."""
        if self.is_late():
            raise refuse("The server ends, or the client has left.", 503)

    def reason(self, finish_reason: str | None) -> str | None:
        """Why the answer ended; transformers looks at its length only."""
        return "stop" if finish_reason == "length" and (self.found or self.is_whole) else finish_reason

    def cut(self, text: str) -> str:
        """`text` up to the first of the texts that end it."""
        places = [text.index(stop) for stop in self.stops if stop in text]
        self.found = self.found or bool(places)
        return text[: min(places)] if places else text

    def sure_part(self, text: str) -> str:
        """`text` without its end, where that may be the beginning of a text that ends the answer."""
        longest = max((len(stop) - 1 for stop in self.stops), default=0)
        for length in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-length:]) for stop in self.stops):
                return text[:-length]
        return text


class EndsAnswer(StoppingCriteria):
    """Ends generation as [`AnswerEnd`] says, after whole tokens."""

    def __init__(self, end: AnswerEnd, processor: Any, prompt_length: int):
        self.end, self.processor, self.prompt_length = end, processor, prompt_length

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        done = [self.end.is_late()] * len(input_ids)
        if self.end.stops:
            texts = self.processor.batch_decode(input_ids[:, self.prompt_length :], skip_special_tokens=True)
            done = [one or any(stop in text for stop in self.end.stops) for one, text in zip(done, texts, strict=True)]
        return torch.tensor(done, device=input_ids.device)


class CutQueue:
    """The texts of a stream as they come, of which only those before the answer's end are let through.

    Args:
        queue (`asyncio.Queue`): Texts, other things that concern nobody here, and `None` at the end.
        end ([`AnswerEnd`]): Of this answer.
    """

    def __init__(self, queue: asyncio.Queue, end: AnswerEnd):
        self.queue, self.end = queue, end
        self.held = ""
        self.ready: list[Any] = []

    async def get(self) -> Any:
        while not self.ready:
            self._let_through(await self.queue.get())
        if self.ready[0] is None:  # who reads it asks at once what the answer has cost
            await self.end.generated.wait()
        return self.ready.pop(0)

    def get_nowait(self) -> Any:
        while not self.ready:
            self._let_through(self.queue.get_nowait())
        if self.ready[0] is None and not self.end.generated.is_set():
            raise asyncio.QueueEmpty
        return self.ready.pop(0)

    def _let_through(self, item: Any) -> None:
        if type(item) is str:  # not those of its subclasses, such as what a model thinks
            if self.end.found:
                return
            text = self.end.cut(self.held + item)
            item = text if self.end.found else self.end.sure_part(text)
            self.held = text[len(item) :]
            self.ready += [item] if item else []
        else:
            self.ready += [self.held, item] if self.held else [item]
            self.held = ""
