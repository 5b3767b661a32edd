"""
The server: transformers' chat handler around one model, as an ASGI application.

`transformers serve` looks models up in tables of its own library and loads whatever a client names. Its parts can be
had one by one: the handler of `/v1/chat/completions` and the thread that generates are taken as they are; what they
ask for a model, and the routes, are ours.
"""

import asyncio
import contextvars
import sys
import time
import uuid
from typing import Any

from jinja2 import TemplateError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.utils import GenerateManager, GenerationState, Modality

from tprl_hf.loading import unknown_words_note

from .chat_requests import Limits, read_body, read_messages, refuse, take_budget, texts_of

# Of the request that the current task serves; read where the task hands it over to the thread that generates.
BUDGET: contextvars.ContextVar[dict[str, Any]] = contextvars.ContextVar("budget")


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


class BudgetedGeneration(GenerateManager):
    """One request after the other, each with its own budget."""

    def generate_streaming(self, model, processor, inputs, *args, **kwargs):
        return super().generate_streaming(model, processor, {**inputs, **BUDGET.get()}, *args, **kwargs)

    async def generate_non_streaming(self, model, processor, inputs, *args, **kwargs):
        return await super().generate_non_streaming(model, processor, {**inputs, **BUDGET.get()}, *args, **kwargs)


class BudgetedState(GenerationState):
    def __init__(self) -> None:
        super().__init__()
        self.generation = BudgetedGeneration()

    def get_manager(self, model_id: str, use_cb: bool = False) -> GenerateManager:
        return self.generation


class ChatHandler(ChatCompletionHandler):
    """transformers' handler, after the budget is taken out of the request and the images are opened."""

    def __init__(self, models: OneModel, limits: Limits, default_budget: dict[str, Any]):
        super().__init__(models, BudgetedState())
        self.models = models
        self.limits = limits
        self.default_budget = default_budget

    async def handle_request(self, body: dict[str, Any], request_id: str) -> Response:
        BUDGET.set(take_budget(body) or self.default_budget)
        if "chat_template_kwargs" in body:  # they could name another template, or replace what is passed here
            raise refuse("chat_template_kwargs are not served.")
        if not isinstance(body.get("generation_config", ""), str):
            raise refuse("generation_config must be a text that holds a JSON object.")
        body["messages"] = await asyncio.to_thread(read_messages, body.get("messages"), self.limits)
        note = unknown_words_note(self.models.processor, texts_of(body["messages"]))
        if note is not None:
            print(f"{request_id}: {note}", file=sys.stderr, flush=True)
        try:
            return await super().handle_request(body, request_id)
        except (ValueError, OSError, TemplateError) as error:  # as on the command line: a user's mistake
            raise refuse(" ".join(str(error).split())) from error


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

    async def chat(request: Request) -> Response:
        body = await read_body(request.stream(), limits.max_bytes)
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
        assert isinstance(error, HTTPException)
        kind = "invalid_request_error" if error.status_code < 500 else "server_error"
        return JSONResponse({"error": {"message": error.detail, "type": kind}}, error.status_code)

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/models", list_models),
            Route("/v1/models/{name:path}", one_model),
            Route("/health", health),
        ],
        exception_handlers={HTTPException: describe_error},
    )
