"""
transformers' handler of `/v1/chat/completions` and the thread that generates, taken as they are; what they ask for a
model, and what a request says besides, is ours.
"""

import asyncio
import json
import time
import traceback
from collections.abc import AsyncIterable, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, NamedTuple

from openai.types.completion_usage import CompletionUsage
from starlette.responses import Response, StreamingResponse
from transformers import GenerationConfig
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from tprl_hf.costs import PromptCost, budget_in_use, prompt_cost
from tprl_hf.pictures import MAX_PIXELS

from .batches import WISHES, Batches, Wishes
from .chat_requests import Question, read_question
from .images import count_pixels, fetch
from .limits import Limits, WaitingRoom, error_response, refuse, status_and_message
from .places import Places, Turn
from .prompts import PreparedProcessor, answer_length, num_positions, prepare
from .records import RequestRecord, usage_details
from .stopping import AnswerEnd

DEFAULT_TOKENS = 1024  # of an answer to a request that does not say


class Prepared(NamedTuple):
    """The inputs of a request, and the place that they take."""

    inputs: Any
    turn: Turn


class OneModel:
    """What transformers' handlers ask of a model manager, for one model that is there already."""

    def __init__(self, name: str, model: Any, processor: Any):
        self.force_model = name  # a request for another model is refused with 400
        self.model = model
        self.processor = processor
        self.created = int(time.time())

    def process_model_name(self, model_id: str) -> str:
        return model_id

    def load_model_and_processor(self, model_id: str, gguf_file: str | None = None) -> tuple[Any, Any]:
        return self.model, PreparedProcessor(self.processor, WISHES.get().inputs)

    def get_model_modality(self, model: Any, processor: Any = None) -> Modality:
        return Modality.VLM

    def describe(self) -> dict[str, Any]:
        """The model's entry in the protocol's list of models."""
        return {"id": self.force_model, "object": "model", "created": self.created, "owned_by": "tprl_hf"}


class OneThread(GenerationState):
    def __init__(self, max_batch: int) -> None:
        super().__init__()
        self.generation = Batches(max_batch)

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.generation


class ChatHandler(ChatCompletionHandler):
    """transformers' handler, after what is ours is taken out of the request and the inputs are made."""

    def __init__(self, models: OneModel, limits: Limits, default_budget: dict[str, Any], room: WaitingRoom):
        super().__init__(models, OneThread(limits.max_batch))
        self.models = models
        self.limits = limits
        self.room = room
        self.default_budget = default_budget
        # two of the largest, or two calls of the model full of small ones
        self.places = Places(2 * MAX_PIXELS, MAX_PIXELS // limits.max_batch)
        self.thread = ThreadPoolExecutor(1, "requests")  # reads and prepares one request after the other

    async def off_the_loop(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    async def read(self, content: bytearray, record: RequestRecord) -> Question:
        """A request, read and checked, with images that are there and not too large."""
        question: Question = await self.off_the_loop(read_question, content, self.limits)
        content.clear()
        body = question.body
        if body.get("model") not in (None, self.models.force_model):
            raise refuse(
                f"This server has the model {self.models.force_model!r}; got {json.dumps(body['model'])[:80]}."
            )
        self._validate_request(body)

        def hold(num_bytes: int) -> None:
            record.held_bytes += num_bytes
            self.room.num_bytes += num_bytes
            self.room.refuse_more()

        await fetch(question.images, self.limits.max_bytes, hold)
        image_processor = self.models.processor.image_processor
        question.num_pixels = await self.off_the_loop(count_pixels, question.images, image_processor)
        return question

    @asynccontextmanager
    async def prepared(self, question: Question, end: AnswerEnd, record: RequestRecord) -> AsyncIterator[Prepared]:
        """The inputs of a question, in one of the places for such. The place is given back after an error only."""
        record.note("read")
        turn = await self.places.take(question.num_pixels)
        try:
            end.refuse_late()
            record.note("waited")
            models = self.models
            inputs = await self.off_the_loop(prepare, question, models.model, models.processor, record.request_id)
            visual = models.model.adapter.find_visual(inputs["input_ids"]).sum()
            record.images, record.visual_tokens = len(question.images), int(visual)
            record.prompt_tokens = inputs["input_ids"].shape[-1]
            record.note("prepared")
            yield Prepared(inputs, turn)
        except (ValueError, OSError) as error:
            turn.end()
            status, message = status_and_message(error)
            raise refuse(message, status) from error
        except BaseException:
            turn.end()
            raise

    async def answer(self, content: bytearray, end: AnswerEnd, record: RequestRecord) -> Response:
        """
        The answer to a request, or the beginning of a stream of it.

        Args:
            content (`bytearray`): The request's body.
            end ([`AnswerEnd`]): Where the answer ends.
            record ([`RequestRecord`]): Of the request.
        """
        question = await self.read(content, record)
        body = question.body
        end.stops += question.stops
        async with self.prepared(question, end, record) as (inputs, turn):
            budget, cost = self.budget_and_cost(question, inputs)
            limit = self.limits.max_image_tokens
            WISHES.set(
                Wishes(
                    end=end,
                    budget=budget,
                    seed=question.seed,
                    inputs=inputs,
                    asked_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
                    num_kept=cost.kept_tokens,
                    max_kept=None if limit is None else limit * len(question.images),
                    timings=question.timings,
                    turn=turn,
                    record=record,
                )
            )
            return await self.handle_request({**body, "messages": question.messages}, record.request_id)

    async def count(self, content: bytearray, end: AnswerEnd, record: RequestRecord) -> dict[str, Any]:
        """What the prompt of a request costs, without an answer. The arguments are those of [`ChatHandler.answer`]."""
        question = await self.read(content, record)
        async with self.prepared(question, end, record) as (inputs, turn):
            _, cost = self.budget_and_cost(question, inputs)
            turn.end()
        record.kept_tokens = cost.kept_tokens or 0
        return {
            "prompt_tokens": cost.prompt_tokens,
            "prompt_tokens_details": {"image_tokens": cost.visual_tokens, "image_tokens_kept": cost.kept_tokens},
            "images": len(question.images),
            "max_prompt_tokens": num_positions(self.models.model),
        }

    def budget_and_cost(self, question: Question, inputs: Any) -> tuple[dict[str, Any], PromptCost]:
        """What a question keeps, within what the server allows, as far as that is known before the model sees it."""
        model, budget = self.models.model, question.budget or self.default_budget
        limit, prompt, ids = self.limits.max_image_tokens, inputs["input_ids"].cpu(), model.adapter.token_ids.values()
        cost = prompt_cost(prompt, ids, budget_in_use(budget, model.pruner.budget, model.config))
        if limit is not None and (cost.kept_tokens or 0) > limit * len(question.images):
            budget = {"num_keep": limit * len(question.images)}
            cost = replace(cost, kept_tokens=budget["num_keep"])
        return budget, cost

    def _build_generation_config(self, body: dict[str, Any], defaults: GenerationConfig, **kwargs: Any) -> Any:
        """Texts that end the answer are ours: transformers' own criterion leaves them in the answer."""
        wishes = WISHES.get()
        config = super()._build_generation_config(body, defaults, **kwargs)
        for stops in (config.stop_strings or [], defaults.stop_strings or []):
            wishes.end.stops += [stops] if isinstance(stops, str) else stops
        config.stop_strings = None
        # `generate` does the same; which requests share a call depends on it
        config.update(**defaults.to_dict(), defaults_only=True)
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
            config.do_sample = True  # by the protocol; without it both would be ignored
        if body.get("stream") and (config.num_beams or 1) > 1:
            raise refuse(f"A stream has one beam; got num_beams={config.num_beams}.")
        asked = wishes.asked_tokens or json.loads(body.get("generation_config") or "{}").get("max_new_tokens")
        default = min(DEFAULT_TOKENS, self.limits.max_tokens)
        length = wishes.inputs["input_ids"].shape[-1]
        config.max_new_tokens = answer_length(asked, default, length, num_positions(self.models.model))
        vocabulary = self.models.model.config.get_text_config().vocab_size
        for token in map(int, body.get("logit_bias") or ()):
            if token >= vocabulary:
                raise refuse(f"logit_bias names the token {token}; the model has {vocabulary:,}.")
        return config

    def _streaming(self, *args: Any, **kwargs: Any) -> StreamingResponse:
        response = super()._streaming(*args, **kwargs)
        wishes = WISHES.get()
        response.body_iterator = by_protocol(response.body_iterator, wishes.end, wishes.record)
        return response

    def _build_completion(
        self, request_id: str, content: str, model_id: str, finish_reason: str, usage: Any = None, **fields: Any
    ) -> dict[str, Any]:
        wishes = WISHES.get()
        content = wishes.end.cut(content)
        note_usage(usage, wishes.record)
        told = super()._build_completion(
            request_id, content, model_id, wishes.end.reason(finish_reason), usage=usage, **fields
        )
        return told | ({"timings": wishes.record.timings()} if wishes.timings else {})

    def _build_chunk_sse(self, *args: Any, finish_reason: str | None = None, usage: Any = None, **fields: Any) -> str:
        wishes = WISHES.get()
        reason = wishes.end.reason(finish_reason)
        if usage is None:
            return super()._build_chunk_sse(*args, finish_reason=reason, **fields)
        note_usage(usage, wishes.record)
        event = super()._build_chunk_sse(*args, finish_reason=reason, usage=usage, **fields)
        if not wishes.timings:
            return event
        told = json.loads(event.removeprefix("data: ")) | {"timings": wishes.record.timings()}
        return self.chunk_to_sse(json.dumps(told))


async def by_protocol(events: AsyncIterable[Any], end: AnswerEnd, record: RequestRecord) -> AsyncIterator[str]:
    """The events of transformers' stream with what it leaves out: the form of a refusal, and the word at the end."""
    async for text in events:
        before, mark, _ = text.partition('data: {"error": ')  # a quote of an answer would be escaped
        if not mark or end.error is None:
            yield text
            continue
        status, message = status_and_message(end.error)
        if status == 500:
            traceback.print_exception(end.error)
        yield f"{before}data: {bytes(error_response(status, message).body).decode()}\n\n"
    record.status = 200  # only now: a client that left before has 499
    if end.error is None:
        yield "data: [DONE]\n\n"


def note_usage(usage: CompletionUsage, record: RequestRecord) -> None:
    """Puts the visual tokens into `usage`, and the answer's tokens into the record."""
    usage.prompt_tokens_details = usage_details(record)
    record.new_tokens = usage.completion_tokens
