"""
The server: transformers' chat handler around one model, as an ASGI application.

`transformers serve` looks models up in tables of its own library and loads whatever a client names. Its parts can be
had one by one: the handler of `/v1/chat/completions` and the thread that generates are taken as they are; what they
ask for a model, and the routes, are ours.
"""

import asyncio
import contextvars
import json
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from .chat_requests import Question, read_question
from .connections import KnownHosts
from .images import fetch, refuse_large
from .limits import Limits, WaitingRoom, error_response, refuse
from .prompts import PreparedProcessor, answer_length, num_positions, prepare
from .stopping import AnswerEnd, CutQueue, EndsAnswer

DEFAULT_TOKENS = 1024  # of an answer to a request that does not say
# Requests whose images are opened: the one that the model answers, and the next one. The others hold only their bytes.
MAX_PREPARED = 2


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
        turn ([`Turn`]): Ends when the model has answered.
    """

    end: AnswerEnd
    budget: dict[str, Any]
    seed: int | None
    inputs: Any
    asked_tokens: int | None
    turn: Turn


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
        wishes = self.wishes
        try:
            wishes.end.refuse_late()
            if wishes.seed is not None:
                torch.manual_seed(wishes.seed)
            ends = EndsAnswer(wishes.end, self.processor, inputs["input_ids"].shape[-1])
            inputs |= {**wishes.budget, "stopping_criteria": StoppingCriteriaList([ends])}
            sequences = self.context.run(self.model.generate, **inputs)
            wishes.end.refuse_late()
            return sequences
        except Exception as error:
            if self.streamed:  # transformers puts the message between quotes as it is
                message = error.detail if isinstance(error, HTTPException) else str(error)
                raise RuntimeError(json.dumps(message)[1:-1]) from error
            raise
        finally:
            wishes.turn.end_from_thread()


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

    async def answer(self, content: bytearray, end: AnswerEnd, request_id: str) -> Response:
        """
        The answer to a request, or the beginning of a stream of it.

        Args:
            content (`bytearray`): The request's body.
            end ([`AnswerEnd`]): Where the answer ends.
            request_id (`str`): Its name.
        """
        question: Question = await self.off_the_loop(read_question, content, self.limits)
        body = question.body
        if body.get("model") not in (None, self.models.force_model):
            raise refuse(
                f"This server has the model {self.models.force_model!r}; got {json.dumps(body['model'])[:80]}."
            )
        self._validate_request(body)
        end.stops += question.stops
        await fetch(question.images, self.limits.max_bytes)
        await self.off_the_loop(refuse_large, question.images, self.models.processor.image_processor)
        await self.places.acquire()
        turn = Turn(self.places)
        try:
            end.refuse_late()
            inputs = await self.off_the_loop(prepare, question, self.models.model, self.models.processor, request_id)
            budget = question.budget or self.default_budget
            asked = body.get("max_completion_tokens") or body.get("max_tokens")
            WISHES.set(Wishes(end, budget, question.seed, inputs, asked, turn))
            return await self.handle_request({**body, "messages": question.messages}, request_id)
        except (ValueError, OSError) as error:  # as on the command line: a user's mistake
            turn.end()
            raise refuse(" ".join(str(error).split())) from error
        except BaseException:
            turn.end()
            raise

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
        self, request_id: str, content: str, model_id: str, finish_reason: str, **fields: Any
    ) -> dict[str, Any]:
        end = WISHES.get().end
        content = end.cut(content)
        reason = "stop" if finish_reason == "length" and end.found else finish_reason
        return super()._build_completion(request_id, content, model_id, reason, **fields)

    def _build_chunk_sse(self, *args: Any, finish_reason: str | None = None, **fields: Any) -> str:
        reason = "stop" if finish_reason == "length" and WISHES.get().end.found else finish_reason
        return super()._build_chunk_sse(*args, finish_reason=reason, **fields)


async def notice_leaving(request: Request, end: AnswerEnd) -> None:
    """Waits until the client has left, or has its answer, and lets the model go."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    end.client_left.set()


class App(Starlette):
    """
    An ASGI application with `/v1/chat/completions`, `/v1/models` and `/health`; nothing else can be reached.

    Args:
        model ([`TPRLForConditionalGeneration`]): With whatever pruner it uses while the application runs.
        processor ([`ProcessorMixin`]): Its processor, with a chat template.
        name (`str`): What clients call the model.
        limits ([`Limits`]): What clients may send.
        default_budget (`dict`, *optional*): Keyword arguments of `generate` for requests without a budget. Without
            it the pruner's own counts, or the checkpoint's.
        hosts (`Iterable[str]`): Host names by which clients may ask, besides addresses and `localhost`.

    Raises:
        `ValueError`: If the processor has no chat template.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        name: str,
        limits: Limits,
        default_budget: dict[str, Any] | None = None,
        hosts: Iterable[str] = (),
    ):
        if not processor.chat_template:
            raise ValueError(
                f"{type(processor).__name__} has no chat template, which says how messages become a prompt."
            )
        self.models = OneModel(name, model, processor)
        self.handler = ChatHandler(self.models, limits, default_budget or {})
        self.room = WaitingRoom(limits)
        self.ends: set[AnswerEnd] = set()
        self.watchers: set[asyncio.Task[None]] = set()  # asyncio itself holds them only weakly
        super().__init__(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/models", self.list_models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/health", self.health),
            ],
            middleware=[Middleware(KnownHosts, names=hosts)],
            exception_handlers={HTTPException: describe_error, Exception: describe_error},
        )

    def end_answers(self) -> None:
        """Lets each answer end with its next token, because the server ends."""
        for end in self.ends:
            end.server_ends.set()

    async def chat(self, request: Request) -> Response:
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":  # what a page of another server may send without being asked
            raise refuse(f"The Content-Type must be application/json; got {json.dumps(kind)[:80]}.", 415)
        content = await self.room.read(request.stream())
        num_bytes, end = len(content), AnswerEnd([])
        self.ends.add(end)
        watcher = asyncio.create_task(notice_leaving(request, end))
        self.watchers.add(watcher)

        def leave(task: asyncio.Task[None]) -> None:
            self.watchers.discard(task)
            self.ends.discard(end)
            self.room.leave(num_bytes)

        watcher.add_done_callback(leave)
        return await self.handler.answer(content, end, f"chatcmpl-{uuid.uuid4()}")

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.models.describe()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.models.force_model:
            raise HTTPException(404, f"There is no model {name!r}; there is {self.models.force_model!r}.")
        return JSONResponse(self.models.describe())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.models.force_model})


async def describe_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return error_response(error.status_code, error.detail)
    return error_response(500, f"The server failed ({type(error).__name__}); its log says where.")
