"""
The server: transformers' chat handler around one model, as an ASGI application.

`transformers serve` looks models up in tables of its own library and loads whatever a client names. Its parts can be
had one by one, see `handler.py`; the routes are ours.
"""

import asyncio
import json
import uuid
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from .connections import KnownHosts
from .handler import ChatHandler, OneModel
from .limits import Limits, WaitingRoom, error_response, failure, refuse
from .records import Metrics, RequestRecord
from .stopping import AnswerEnd


async def notice_leaving(request: Request, end: AnswerEnd) -> None:
    """Waits until the client has left, or has its answer, and lets the model go."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    end.client_left.set()


class App(Starlette):
    """
    An ASGI application with the routes of docs/serving.md; nothing else can be reached.

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
        self.room = WaitingRoom(limits)
        self.handler = ChatHandler(self.models, limits, default_budget or {}, self.room)
        self.metrics = Metrics(lambda: self.room.num_waiting)
        self.ends: set[AnswerEnd] = set()
        self.watchers: set[asyncio.Task[None]] = set()  # asyncio itself holds them only weakly
        super().__init__(
            routes=[
                Route("/v1/chat/completions", self.chat, methods=["POST"]),
                Route("/v1/chat/completions/count", self.count, methods=["POST"]),
                Route("/v1/models", self.list_models),
                Route("/v1/models/{name:path}", self.one_model),
                Route("/health", self.health),
                Route("/metrics", self.show_metrics),
            ],
            middleware=[Middleware(KnownHosts, names=hosts)],
            exception_handlers={HTTPException: describe_error, Exception: describe_error},
        )

    def end_answers(self) -> None:
        """Lets each answer end with its next token, because the server ends."""
        for end in self.ends:
            end.server_ends.set()

    async def chat(self, request: Request) -> Response:
        return await self.serve(request, self.handler.answer)

    async def count(self, request: Request) -> Response:
        return await self.serve(request, self.handler.count)

    async def serve(self, request: Request, answer: Callable[..., Awaitable[Any]]) -> Response:
        """Reads a request, hands it to `answer`, and keeps account of it until it is over."""
        record, end = RequestRecord(f"chatcmpl-{uuid.uuid4()}"), AnswerEnd([])
        try:
            kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":  # what a page of another server may send without being asked
                raise refuse(f"The Content-Type must be application/json; got {json.dumps(kind)[:80]}.", 415)
            content = await self.room.read(request.stream())
        except BaseException as error:
            note_refusal(record, error)
            self.metrics.add(record)
            raise
        record.held_bytes = len(content)
        self.ends.add(end)
        watcher = asyncio.create_task(notice_leaving(request, end))
        self.watchers.add(watcher)

        def leave(task: asyncio.Task[None]) -> None:
            self.watchers.discard(task)
            self.ends.discard(end)
            self.room.leave(record.held_bytes)
            record.status = record.status or 499
            self.metrics.add(record)

        watcher.add_done_callback(leave)
        try:
            found = await answer(content, end, record)
        except BaseException as error:
            note_refusal(record, error)
            raise
        response = found if isinstance(found, Response) else JSONResponse(found)
        if not isinstance(response, StreamingResponse):  # which notes it at its end
            record.status = response.status_code
        return response

    async def show_metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def list_models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self.models.describe()]})

    async def one_model(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name != self.models.force_model:
            raise HTTPException(404, f"There is no model {name!r}; there is {self.models.force_model!r}.")
        return JSONResponse(self.models.describe())

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.models.force_model})


def note_refusal(record: RequestRecord, error: BaseException) -> None:
    record.status = error.status_code if isinstance(error, HTTPException) else 500
    record.problem = error.detail if isinstance(error, HTTPException) else type(error).__name__


async def describe_error(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException):
        return error_response(error.status_code, error.detail)
    return error_response(500, failure(error))
