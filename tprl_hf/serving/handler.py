"""
transformers' handler of `/v1/chat/completions` and the thread that generates, taken as they are; what they ask for a
model, and what a request says besides, is ours.
"""

import asyncio
import contextvars
import json
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from openai.types.completion_usage import CompletionUsage
from starlette.exceptions import HTTPException
from starlette.responses import Response
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from tprl_hf.costs import budget_in_use, prompt_cost

from .chat_requests import Question, read_question
from .images import fetch, refuse_large
from .limits import Limits, refuse
from .prompts import PreparedProcessor, answer_length, num_positions, prepare
from .records import RequestRecord, usage_details
from .stopping import AnswerEnd, CutQueue, EndsAnswer

DEFAULT_TOKENS = 1024  # of an answer to a request that does not say
# Requests whose images are opened: the one that the model answers, and the next one. The others hold only their bytes.
MAX_PREPARED = 2


class Prepared(NamedTuple):
    """The inputs of a request, and the place that they take."""

    inputs: Any
    turn: "Turn"


class Turn:
    """
    A place among the requests whose images are opened.

    Args:
        places (`asyncio.Semaphore`): Of which one was taken.
    """

    def __init__(self, places: asyncio.Semaphore):
        self.places = places
        self.loop = asyncio.get_running_loop()
        self.ended = False

    def end(self) -> None:
        """Gives the place back, once."""
        if not self.ended:
            self.ended = True
            self.places.release()

    def end_from_thread(self) -> None:
        self.loop.call_soon_threadsafe(self.end)


@dataclass
class Wishes:
    """
    What a request asks for besides what transformers' handler knows.

    Args:
        end ([`AnswerEnd`]): Where the answer ends.
        budget (`dict`): Keyword arguments of `generate`.
        seed (`int`, *optional*): Of the random numbers, where the answer is drawn.
        inputs ([`BatchFeature`]): Of the model.
        asked_tokens (`int`, *optional*): The longest answer that the request asks for.
        max_kept (`int`, *optional*): The most visual tokens that it may keep.
        timings (`bool`): Whether the answer says what took how long.
        turn ([`Turn`]): Ends when the model has answered.
        record ([`RequestRecord`]): Of the request.
    """

    end: AnswerEnd
    budget: dict[str, Any]
    seed: int | None
    inputs: Any
    asked_tokens: int | None
    max_kept: int | None
    timings: bool
    turn: Turn
    record: RequestRecord


# Of the request that the current task serves; read where the task hands it over to the thread that generates.
WISHES: contextvars.ContextVar[Wishes] = contextvars.ContextVar("wishes")


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


class OneAnswer:
    """The model as the thread that generates gets it for one request."""

    def __init__(self, model: Any, processor: Any, streamed: bool):
        self.model = model
        self.processor = processor
        self.streamed = streamed
        self.wishes = WISHES.get()
        self.context = contextvars.copy_context()  # in which the model has the pruner that it has here

    def generate(self, **inputs: Any) -> Any:
        wishes, record = self.wishes, self.wishes.record
        try:
            wishes.end.refuse_late()
            if wishes.seed is not None:
                torch.manual_seed(wishes.seed)
            ends = EndsAnswer(wishes.end, self.processor, inputs["input_ids"].shape[-1])
            inputs |= {"stopping_criteria": StoppingCriteriaList([ends]), "return_dict_in_generate": True}
            record.note("waited")
            output = self.context.run(self.generate_within, **inputs)
            record.note("generated")
            # a model that pruned nothing does not say how many it kept
            record.kept_tokens = int(output["num_kept"]) if "num_kept" in output else record.visual_tokens
            wishes.end.refuse_late()
            return output.sequences
        except Exception as error:
            record.problem = error.detail if isinstance(error, HTTPException) else str(error)
            if self.streamed:  # transformers puts the message between quotes as it is
                raise RuntimeError(json.dumps(record.problem)[1:-1]) from error
            raise
        finally:
            wishes.turn.end_from_thread()
            wishes.turn.loop.call_soon_threadsafe(wishes.end.generated.set)

    def generate_within(self, **inputs: Any) -> Any:
        """Lowers a budget that keeps more than the server allows."""
        budget, most = self.wishes.budget, self.wishes.max_kept
        if most is not None and self.wishes.record.visual_tokens > most:
            taken = {name: inputs[name] for name in self.wishes.inputs}
            features = self.model.encode_images(**taken)
            plan = self.model.prune(**taken, **budget, visual_features=features)
            if int(plan.num_kept) > most:
                budget = {"num_keep": most}
            inputs["visual_features"] = features
        return self.model.generate(**inputs, **budget)


class OneAtATime(GenerateManager):
    """One request after the other, each with its own budget and end."""

    def generate_streaming(self, model, processor, *args, **kwargs):
        answer = OneAnswer(model, processor, streamed=True)
        queue, streamer = super().generate_streaming(answer, processor, *args, **kwargs)
        return CutQueue(queue, answer.wishes.end), streamer

    async def generate_non_streaming(self, model, processor, *args, **kwargs):
        answer = OneAnswer(model, processor, streamed=False)
        return await super().generate_non_streaming(answer, processor, *args, **kwargs)


class OneThread(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self.generation = OneAtATime()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.generation


class ChatHandler(ChatCompletionHandler):
    """transformers' handler, after what is ours is taken out of the request and the inputs are made."""

    def __init__(self, models: OneModel, limits: Limits, default_budget: dict[str, Any]):
        super().__init__(models, OneThread())
        self.models = models
        self.limits = limits
        self.default_budget = default_budget
        self.places = asyncio.Semaphore(MAX_PREPARED)
        self.thread = ThreadPoolExecutor(1, "requests")  # reads and prepares one request after the other

    async def off_the_loop(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self.thread, function, *args)

    async def read(self, content: bytearray) -> Question:
        """A request, read and checked, with images that are there and not too large."""
        question: Question = await self.off_the_loop(read_question, content, self.limits)
        body = question.body
        if body.get("model") not in (None, self.models.force_model):
            raise refuse(
                f"This server has the model {self.models.force_model!r}; got {json.dumps(body['model'])[:80]}."
            )
        self._validate_request(body)
        await fetch(question.images, self.limits.max_bytes)
        await self.off_the_loop(refuse_large, question.images, self.models.processor.image_processor)
        return question

    @asynccontextmanager
    async def prepared(self, question: Question, end: AnswerEnd, record: RequestRecord) -> AsyncIterator[Prepared]:
        """The inputs of a question, in one of the places for such. The place is given back after an error only."""
        record.note("read")
        await self.places.acquire()
        turn = Turn(self.places)
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
        except (ValueError, OSError) as error:  # as on the command line: a user's mistake
            turn.end()
            raise refuse(" ".join(str(error).split())) from error
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
        question = await self.read(content)
        body = question.body
        end.stops += question.stops
        limit = self.limits.max_image_tokens
        async with self.prepared(question, end, record) as (inputs, turn):
            WISHES.set(
                Wishes(
                    end=end,
                    budget=question.budget or self.default_budget,
                    seed=question.seed,
                    inputs=inputs,
                    asked_tokens=body.get("max_completion_tokens") or body.get("max_tokens"),
                    max_kept=None if limit is None else limit * len(question.images),
                    timings=question.timings,
                    turn=turn,
                    record=record,
                )
            )
            return await self.handle_request({**body, "messages": question.messages}, record.request_id)

    async def count(self, content: bytearray, end: AnswerEnd, record: RequestRecord) -> dict[str, Any]:
        """What the prompt of a request costs, without an answer. The arguments are those of [`ChatHandler.answer`]."""
        question = await self.read(content)
        model = self.models.model
        budget = budget_in_use(question.budget or self.default_budget, model.pruner.budget, model.config)
        async with self.prepared(question, end, record) as (inputs, turn):
            cost = prompt_cost(inputs["input_ids"].cpu(), model.adapter.token_ids.values(), budget)
            turn.end()
        kept, limit = cost.kept_tokens, self.limits.max_image_tokens
        if limit is not None:
            kept = min(cost.visual_tokens if kept is None else kept, limit * len(question.images))
        record.kept_tokens = kept or 0
        return {
            "prompt_tokens": cost.prompt_tokens,
            "prompt_tokens_details": {"image_tokens": cost.visual_tokens, "image_tokens_kept": kept},
            "images": len(question.images),
            "max_prompt_tokens": num_positions(model),
        }

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        """Texts that end the answer are ours: transformers' own criterion is handed the processor, and fails."""
        wishes = WISHES.get()
        config = super()._build_generation_config(body, *args, **kwargs)
        stops, config.stop_strings = config.stop_strings or [], None
        wishes.end.stops += [stops] if isinstance(stops, str) else stops
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
            config.do_sample = True  # by the protocol; without it both would be ignored
        asked = wishes.asked_tokens or json.loads(body.get("generation_config") or "{}").get("max_new_tokens")
        default = min(DEFAULT_TOKENS, self.limits.max_tokens)
        length = wishes.inputs["input_ids"].shape[-1]
        config.max_new_tokens = answer_length(asked, default, length, num_positions(self.models.model))
        vocabulary = self.models.model.config.get_text_config().vocab_size
        for (token,) in config.sequence_bias or {}:
            if token >= vocabulary:
                raise refuse(f"logit_bias names the token {token}; the model has {vocabulary:,}.")
        return config

    def _build_completion(
        self, request_id: str, content: str, model_id: str, finish_reason: str, usage: Any = None, **fields: Any
    ) -> dict[str, Any]:
        wishes = WISHES.get()
        content = wishes.end.cut(content)
        reason = "stop" if finish_reason == "length" and wishes.end.found else finish_reason
        note_usage(usage, wishes.record)
        told = super()._build_completion(request_id, content, model_id, reason, usage=usage, **fields)
        return told | ({"timings": wishes.record.timings()} if wishes.timings else {})

    def _build_chunk_sse(self, *args: Any, finish_reason: str | None = None, usage: Any = None, **fields: Any) -> str:
        wishes = WISHES.get()
        reason = "stop" if finish_reason == "length" and wishes.end.found else finish_reason
        if usage is None:
            return super()._build_chunk_sse(*args, finish_reason=reason, **fields)
        note_usage(usage, wishes.record)
        event = super()._build_chunk_sse(*args, finish_reason=reason, usage=usage, **fields)
        if not wishes.timings:
            return event
        told = json.loads(event.removeprefix("data: ")) | {"timings": wishes.record.timings()}
        return self.chunk_to_sse(json.dumps(told))


def note_usage(usage: CompletionUsage, record: RequestRecord) -> None:
    """Puts the visual tokens into `usage`, and the answer's tokens into the record."""
    usage.prompt_tokens_details = usage_details(record)
    record.new_tokens = usage.completion_tokens
