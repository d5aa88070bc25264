"""The HTTP side: one FastAPI application, which knows neither models nor Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

from picinspector import __version__
from picinspector.bundle import Bundle
from picinspector.errors import ErrorKind
from picinspector.serve.answers import Models, Photo, Photos, Problem, Reference, State
from picinspector.serve.gate import Gate, Metrics
from picinspector.serve.intake import FIELD, Intake, refusal
from picinspector.serve.load import Capacity, Load
from picinspector.serve.page import render
from picinspector.serve.problems import RequestError, busy, failed
from picinspector.serve.settings import Rules
from picinspector.text import one_line

#: Photos of one batch request.
BATCH_MAX = 64
#: Of them, before the replicas at once: a batch leaves room for others.
_BATCH_AT_ONCE = 8
#: After so long a photo of a batch, for which there was no room, comes again.
_AGAIN_S = 0.25

#: A photo, by its bytes and its name, to its row: `schema.SCORES`, `facts`, `measurements`. Raises RequestError.
Judge = Callable[[bytes, str], Awaitable[dict[str, Any]]]
#: What FastAPI calls so.
Responses = dict[int | str, dict[str, Any]]
#: Whether a photo would be judged now.
Ready = Callable[[], Awaitable[bool]]


def make_app(rules: Rules, bundle: Bundle, judge: Judge, ready: Ready, capacity: Capacity) -> ASGIApp:
    """The application behind its gate.

    Args:
        rules: who may ask, and how much.
        bundle: that judges.
        judge: asks it.
        ready: whether it can be asked.
        capacity: what it can be asked at once.
    """
    load, metrics = Load(capacity, rules.timeout_s), Metrics()
    return Gate(_Front(rules, bundle, judge, ready, load, metrics).app, rules, load, metrics)


class _Front:
    """The routes."""

    def __init__(self, rules: Rules, bundle: Bundle, judge: Judge, ready: Ready, load: Load, metrics: Metrics) -> None:
        self._rules, self._judge_photo, self._ready = rules, judge, ready
        self._load, self._metrics, self._intake = load, metrics, Intake(rules)
        self._models, self._page = _describe(bundle), render(rules.token is not None, bundle.scorer_kind)
        # No /docs: they come from a server elsewhere. No redirects: they would go where the client says that this is.
        app = FastAPI(title="PicInspector", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
        bad: Responses = {number: {"model": Problem, "description": text} for number, text in _PROBLEMS.items()}
        secured: dict[str, Any] = {"security": [{"bearer": []}]} if rules.token is not None else {}
        post: dict[str, Any] = {"methods": ["POST"], "responses": bad}
        get: dict[str, Any] = {"methods": ["GET"]}
        app.add_api_route("/v1/score", self.score, response_model=Photo, openapi_extra=_ONE | secured, **post)
        app.add_api_route("/v1/score/batch", self.batch, response_model=Photos, openapi_extra=_MANY | secured, **post)
        app.add_api_route("/v1/health", self.health, response_model=State, **get)
        unready: Responses = {503: {"model": State, "description": "no replica is up"}}
        app.add_api_route("/v1/ready", self.ready, response_model=State, responses=unready, **get)
        guarded: dict[str, Any] = {"openapi_extra": secured, "responses": {401: bad[401]} if secured else {}}
        app.add_api_route("/v1/models", self.models, response_model=Models, **guarded, **get)
        app.add_api_route("/metrics", self.metrics, include_in_schema=False, **get)
        app.add_api_route("/", self.page, include_in_schema=False, **get)
        for kind, handler in _HANDLERS.items():
            app.add_exception_handler(kind, handler)
        self.app, plain = app, app.openapi

        def openapi() -> dict[str, Any]:
            found = plain()
            parts = found.setdefault("components", {})
            parts.setdefault("schemas", {})["Reference"] = Reference.model_json_schema()
            if secured:
                parts["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
            return found

        app.openapi = openapi  # type: ignore[method-assign]

    async def score(self, request: Request) -> Response:
        """Judge one photo."""
        row = await self._judge(*await self._intake.one(request), request)
        if row["error_kind"] is not None:
            raise refusal(row["error_kind"], row["error_message"])
        return _json(Photo.model_validate(row))

    async def batch(self, request: Request) -> Response:
        """Judge up to 64 photos; one that cannot be judged does not keep the others from it."""
        photos, turns = await self._intake.many(request, BATCH_MAX), asyncio.Semaphore(_BATCH_AT_ONCE)

        async def judge(data: bytes, name: str) -> dict[str, Any]:
            async with turns:
                return await self._judge_at_last(data, name, request)

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(judge(*photo)) for photo in photos]
        except* RequestError as refused:
            raise refused.exceptions[0] from None
        return _json(Photos.model_validate({"photos": [task.result() for task in tasks]}))

    async def health(self) -> Response:
        """Whether the service is alive."""
        return _json(State(status="ok"))

    async def ready(self) -> Response:
        """Whether the service can judge photos now."""
        ready = await self._ready()
        return _json(State(status="ok" if ready else "starting"), 200 if ready else 503)

    async def models(self) -> Response:
        """Which bundle judges."""
        return _json(self._models)

    async def metrics(self) -> Response:
        """For Prometheus."""
        return Response(generate_latest(self._metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def page(self) -> Response:
        """A page for people."""
        return Response(self._page.content, media_type="text/html; charset=utf-8", headers=self._page.headers)

    async def _judge_at_last(self, data: bytes, name: str, request: Request) -> dict[str, Any]:
        """The same for one of many, which would all be lost with it: where there is no room, it waits for some."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                return await self._judge(data, name, request)
            except RequestError as error:
                if error.status != 503 or loop.time() + _AGAIN_S >= request.state.deadline:
                    raise
            await asyncio.sleep(_AGAIN_S)

    async def _judge(self, data: bytes, name: str, request: Request) -> dict[str, Any]:
        with self._load.photo() as place:
            try:
                async with asyncio.timeout_at(request.state.deadline):
                    row = await self._judge_photo(data, name)
            except TimeoutError:
                place.passed()
                if place.had_to_wait:
                    raise busy("the photo waited for others until its time was up; come again") from None
                text = f"there was no answer within {self._rules.timeout_s:g} s"
                raise RequestError(504, ErrorKind.TIMEOUT.value, text) from None
            place.passed()
        self._metrics.photos.labels(row["error_kind"] or "ok").inc()
        return row


# --- words and schemas ------------------------------------------------------------------------------------------------

_PROBLEMS = {
    400: "the request ended early, or is no HTTP",
    401: "the bearer token is missing or wrong",
    403: "asked by a page of another origin",
    408: "the request did not come in time",
    413: "the request, the file or the picture is too large",
    415: "neither a form nor JSON",
    421: "asked by another name than localhost",
    422: "no photo, or none that can be judged",
    431: "the head of the request is too large",
    502: "the server of the URL cannot be reached",
    503: "too busy; Retry-After says when to come again",
    504: "there was no answer in time, here or from the server of the URL",
}
_FILE = {"type": "string", "format": "binary"}
_JSON_BODY = {"schema": {"$ref": "#/components/schemas/Reference"}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {"properties": {FIELD: schema}, "additionalProperties": False}
    return {"schema": {"type": "object", "required": [FIELD]} | properties}


_ONE: dict[str, Any] = {
    "requestBody": {"required": True, "content": {"multipart/form-data": _form(_FILE), "application/json": _JSON_BODY}}
}
_MANY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": _form({"type": "array", "items": _FILE, "minItems": 1, "maxItems": BATCH_MAX})
        },
    }
}


def _describe(bundle: Bundle) -> Models:
    return Models(
        name=bundle.name,
        version=bundle.version,
        pieces=bundle.pieces,
        scorer_kind=bundle.scorer_kind,
        encoder_fingerprint=bundle.encoder_fingerprint,
        scorer_fingerprint=bundle.scorer_fingerprint,
        caption_fingerprint=bundle.caption_fingerprint if bundle.has("captioner") else None,
        card=(bundle.folder / "README.md").read_text("utf-8") if "README.md" in bundle.files else "",
    )


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


async def _on_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return error.to_response()


async def _on_http(_: Request, error: Exception) -> Response:
    """No such path, or not with this method."""
    assert isinstance(error, HTTPException)
    kind = {404: "not_found", 405: "method_not_allowed"}.get(error.status_code, "invalid_request")
    return RequestError(error.status_code, kind, one_line(str(error.detail)), error.headers).to_response()


async def _on_invalid(_: Request, error: Exception) -> Response:
    return RequestError(422, "invalid_request", "the request is not as the OpenAPI has it").to_response()


async def _on_failure(_: Request, error: Exception) -> Response:
    """The client is told nothing; the error goes on to the gate, which logs it."""
    return failed().to_response()


_HANDLERS: dict[type[Exception], Any] = {
    Exception: _on_failure,
    RequestError: _on_refusal,
    HTTPException: _on_http,
    RequestValidationError: _on_invalid,
}
