"""The HTTP side: one FastAPI application, which knows neither models nor Ray."""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel, ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.responses import Response
from starlette.types import ASGIApp

from picinspector import __version__
from picinspector.bundle import Bundle
from picinspector.errors import ErrorKind, PhotoError, UsageError
from picinspector.serve.answers import Models, Photo, Photos, Problem, Reference, State
from picinspector.serve.gate import Gate, Metrics, RequestError, Rules, busy, failed, too_large
from picinspector.serve.page import render
from picinspector.storage import redact
from picinspector.text import one_line
from picinspector.web import fetch_url

#: Photos of one batch request.
BATCH_MAX = 64
#: Of them, before the replicas at once: a batch leaves room for others.
_BATCH_AT_ONCE = 8
#: URLs fetched at once.
_FETCHES = 16
_NAME_CHARACTERS = 255
#: A field of `multipart/form-data`.
_FIELD = "photo"

#: A photo, by its bytes and its name, to its row: `schema.SCORES`, `facts`, `measurements`. Raises RequestError.
Judge = Callable[[bytes, str], Awaitable[dict[str, Any]]]
#: What FastAPI calls so.
Responses = dict[int | str, dict[str, Any]]
#: Whether a photo would be judged now.
Ready = Callable[[], Awaitable[bool]]


class _InMemory(MultiPartParser):
    """Starlette's parser, but no photo goes to disk: 0 is no limit, and the gate has counted the bytes."""

    spool_max_size = 0


def make_app(rules: Rules, bundle: Bundle, judge: Judge, ready: Ready) -> ASGIApp:
    """The application behind its gate.

    Args:
        rules: who may ask, and how much.
        bundle: that judges.
        judge: asks it.
        ready: whether it can be asked.
    """
    return Gate(_Front(rules, bundle, judge, ready, metrics := Metrics()).app, rules, metrics)


class _Front:
    """The routes."""

    def __init__(self, rules: Rules, bundle: Bundle, judge: Judge, ready: Ready, metrics: Metrics) -> None:
        self._rules, self._judge_photo, self._ready, self._metrics = rules, judge, ready, metrics
        self._models, self._page = _describe(bundle), render(rules.token is not None, bundle.scorer_kind)
        self._fetchers, self._fetching = ThreadPoolExecutor(_FETCHES, "fetch"), 0
        # No /docs: they come from a server elsewhere.
        app = FastAPI(title="PicInspector", version=__version__, docs_url=None, redoc_url=None)
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
        if _content_type(request) == "application/json":
            data, name = await self._referred(request)
        else:
            [(data, name)] = await self._uploaded(request, 1)
        row = await self._judge(data, name, request)
        if row["error_kind"] is not None:
            raise _refusal(row["error_kind"], row["error_message"])
        return _json(Photo.model_validate(row))

    async def batch(self, request: Request) -> Response:
        """Judge up to 64 photos; one that cannot be judged does not keep the others from it."""
        photos, turns = await self._uploaded(request, BATCH_MAX), asyncio.Semaphore(_BATCH_AT_ONCE)

        async def judge(data: bytes, name: str) -> dict[str, Any]:
            async with turns:
                return await self._judge(data, name, request)

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

    async def _judge(self, data: bytes, name: str, request: Request) -> dict[str, Any]:
        try:
            async with asyncio.timeout_at(request.state.deadline):
                row = await self._judge_photo(data, name)
        except TimeoutError:
            text = f"there was no answer within {self._rules.timeout_s:g} s"
            raise RequestError(504, ErrorKind.TIMEOUT.value, text) from None
        self._metrics.photos.labels(row["error_kind"] or "ok").inc()
        return row

    async def _uploaded(self, request: Request, most: int) -> list[tuple[bytes, str]]:
        """The photos of a form, with their names."""
        if _content_type(request) != "multipart/form-data":
            kinds = "multipart/form-data" if most > 1 else "multipart/form-data or application/json"
            raise RequestError(415, "unsupported_media_type", f"send the photo as {kinds}", {"connection": "close"})
        try:
            form = await _InMemory(request.headers, request.stream(), max_files=most, max_fields=0).parse()
        except MultiPartException as error:
            text = f"{one_line(error.message)} Send 1 to {most} files in fields named {_FIELD}"
            raise RequestError(422, "invalid_request", text, {"connection": "close"}) from None
        try:
            photos = []
            for field, part in form.multi_items():
                if field != _FIELD or not isinstance(part, UploadFile):
                    raise RequestError(422, "invalid_request", f"the form has a field that is not named {_FIELD}")
                if (part.size or 0) > self._rules.limits.max_bytes:
                    raise too_large("a photo", self._rules.limits.max_bytes)
                photos.append((await part.read(), one_line(part.filename or "")[:_NAME_CHARACTERS]))
        finally:
            await form.close()
        if not photos:
            raise RequestError(
                422, "invalid_request", f"the form has no photo; send 1 to {most} in fields named {_FIELD}"
            )
        return photos

    async def _referred(self, request: Request) -> tuple[bytes, str]:
        """The photo that a JSON body names or holds, with its name."""
        try:
            wanted = Reference.model_validate_json(await request.body())
        except ValidationError as error:  # what was sent is not repeated
            problems = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}".strip(": ") for one in error.errors())
            raise RequestError(422, "invalid_request", one_line("; ".join(problems))[:500]) from None
        if (wanted.url is None) == (wanted.base64 is None):
            raise RequestError(422, "invalid_request", 'give one of "url" and "base64"')
        name = one_line(wanted.name)
        if wanted.url is not None:
            path = wanted.url.partition("#")[0].partition("?")[0]
            return await self._fetch(wanted.url, request), name or one_line(redact(path))
        try:
            data = base64.b64decode(wanted.base64 or "", validate=True)
        except (binascii.Error, ValueError):
            raise RequestError(422, "invalid_request", "base64: cannot be decoded") from None
        if len(data) > self._rules.limits.max_bytes:
            raise too_large("the photo", self._rules.limits.max_bytes)
        return data, name

    async def _fetch(self, url: str, request: Request) -> bytes:
        if self._fetching >= _FETCHES:
            raise busy("too many URLs are being fetched; come again")
        loop = asyncio.get_running_loop()
        left_s = max(0.1, request.state.deadline - loop.time())
        arguments = (url, self._rules.limits.max_bytes, left_s, self._rules.allow_private)
        self._fetching += 1
        try:
            return await loop.run_in_executor(self._fetchers, fetch_url, *arguments)
        except PhotoError as error:
            raise _refusal(error.kind.value, error.message) from None
        except UsageError as error:
            raise RequestError(422, "invalid_request", one_line(str(error))) from None
        finally:
            self._fetching -= 1


# --- words and schemas ------------------------------------------------------------------------------------------------

_PROBLEMS = {
    400: "the request ended early, or is no HTTP",
    401: "the bearer token is missing or wrong",
    408: "the request did not come in time",
    413: "the request, the file or the picture is too large",
    415: "neither a form nor JSON",
    422: "no photo, or none that can be judged",
    503: "too busy; Retry-After says when to come again",
    504: "there was no answer in time",
}
_FILE = {"type": "string", "format": "binary"}
_JSON_BODY = {"schema": {"$ref": "#/components/schemas/Reference"}}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    properties = {"properties": {_FIELD: schema}, "additionalProperties": False}
    return {"schema": {"type": "object", "required": [_FIELD]} | properties}


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


def _content_type(request: Request) -> str:
    kind: bytes = parse_options_header(request.headers.get("content-type", ""))[0]
    return kind.decode("latin-1").lower()


def _json(answer: BaseModel, status: int = 200) -> Response:
    return Response(answer.model_dump_json(), status, media_type="application/json")


def _refusal(kind: str, message: str) -> RequestError:
    """What is wrong with a photo, as an answer."""
    if kind in (ErrorKind.TOO_MANY_BYTES, ErrorKind.TOO_MANY_PIXELS):
        return RequestError(413, kind, message)
    return RequestError(500 if kind == ErrorKind.INTERNAL else 422, kind, message)


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
