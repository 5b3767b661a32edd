"""
The server: transformers' chat handler around one model, as an ASGI application.

`transformers serve` looks models up in tables of its own library and loads whatever a client names. Its parts can be
had one by one: the handler of `/v1/chat/completions` and the thread that generates are taken as they are; what they
ask for a model, and the routes, are ours.
"""

import asyncio
import contextvars
import json
import sys
import time
import uuid
from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers import GenerationConfig, StoppingCriteriaList
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from tprl_hf.loading import unknown_words_note

from .chat_requests import (
    Limits,
    read_body,
    read_messages,
    refuse,
    refuse_unserved,
    take_budget,
    take_seed,
    take_stops,
    texts_of,
)
from .stopping import AnswerEnd, CutQueue, EndsAnswer


@dataclass
class Wishes:
    """
    What a request asks for besides what transformers' handler knows.

    Args:
        budget (`dict`): Keyword arguments of `generate`.
        seed (`int`, *optional*): Of the random numbers, where the answer is drawn.
        end ([`AnswerEnd`]): Where the answer ends.
    """

    budget: dict[str, Any]
    seed: int | None
    end: AnswerEnd


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
        return self.model, self.processor

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
        if wishes.end.client_left.is_set():
            raise ConnectionAbortedError("The client has left.")
        if wishes.seed is not None:
            torch.manual_seed(wishes.seed)
        ends = EndsAnswer(wishes.end, self.processor, inputs["input_ids"].shape[-1])
        inputs |= {**wishes.budget, "stopping_criteria": StoppingCriteriaList([ends])}
        try:
            return self.context.run(self.model.generate, **inputs)
        except Exception as error:
            if self.streamed:  # transformers puts the message between quotes as it is
                raise RuntimeError(json.dumps(str(error))[1:-1]) from error
            raise


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
    """transformers' handler, after what is ours is taken out of the request and the images are opened."""

    def __init__(self, models: OneModel, limits: Limits, default_budget: dict[str, Any]):
        super().__init__(models, OneThread())
        self.models = models
        self.limits = limits
        self.default_budget = default_budget

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        refuse_unserved(body)
        wishes = Wishes(take_budget(body) or self.default_budget, take_seed(body), WISHES.get().end)
        wishes.end.stops += take_stops(body)
        WISHES.set(wishes)
        body["messages"] = await asyncio.to_thread(read_messages, body.get("messages"), self.limits)
        note = unknown_words_note(self.models.processor, texts_of(body["messages"]))
        if note is not None:
            print(f"{request_id}: {note}", file=sys.stderr, flush=True)
        try:
            return await super().handle_request(body, request_id)
        except (ValueError, OSError, TemplateError) as error:  # as on the command line: a user's mistake
            raise refuse(" ".join(str(error).split())) from error

    def _build_generation_config(self, body: dict[str, Any], *args: Any, **kwargs: Any) -> GenerationConfig:
        """Texts that end the answer are ours: transformers' own criterion is handed the processor, and fails."""
        config = super()._build_generation_config(body, *args, **kwargs)
        stops, config.stop_strings = config.stop_strings or [], None
        WISHES.get().end.stops += [stops] if isinstance(stops, str) else stops
        if body.get("temperature") or (body.get("top_p") is not None and body.get("temperature") is None):
            config.do_sample = True  # by the protocol; without it both would be ignored
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


def build_app(
    model: Any, processor: Any, name: str, limits: Limits, default_budget: dict[str, Any] | None = None
) -> Starlette:
    """
    An ASGI application with `/v1/chat/completions`, `/v1/models` and `/health`; nothing else can be reached.

    Args:
        model ([`TPRLForConditionalGeneration`]): With whatever pruner it uses while the application runs.
        processor ([`ProcessorMixin`]): Its processor, with a chat template.
        name (`str`): What clients call the model.
        limits ([`Limits`]): What clients may send.
        default_budget (`dict`, *optional*): Keyword arguments of `generate` for requests without a budget. Without
            it the pruner's own counts, or the checkpoint's.

    Raises:
        `ValueError`: If the processor has no chat template.
    """
    if not processor.chat_template:
        raise ValueError(f"{type(processor).__name__} has no chat template, which says how messages become a prompt.")
    models = OneModel(name, model, processor)
    handler = ChatHandler(models, limits, default_budget or {})

    watchers: set[asyncio.Task[None]] = set()  # asyncio itself holds them only weakly

    async def chat(request: Request) -> Response:
        body = await read_body(request.stream(), limits.max_bytes)
        end = AnswerEnd([])
        WISHES.set(Wishes({}, None, end))
        watcher = asyncio.create_task(notice_leaving(request, end))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        return await handler.handle_request(body, f"chatcmpl-{uuid.uuid4()}")

    def list_models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [models.describe()]})

    def one_model(request: Request) -> Response:
        if request.path_params["name"] != name:
            raise HTTPException(404, f"There is no model {request.path_params['name']!r}; there is {name!r}.")
        return JSONResponse(models.describe())

    def health(request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": name})

    def describe_error(request: Request, error: Exception) -> Response:
        if not isinstance(error, HTTPException):
            error = HTTPException(500, f"The server failed ({type(error).__name__}); its log says where.")
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse({"error": {"message": error.detail, "type": kind}}, error.status_code)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: describe_error, Exception: describe_error},
    )
