"""From a request to the photos in it: a form, JSON, or a URL that is fetched."""

from __future__ import annotations

import asyncio
import base64
import binascii
import threading
from concurrent.futures import ThreadPoolExecutor

from fastapi import Request
from pydantic import ValidationError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from picinspector.errors import ErrorKind, PhotoError, UsageError
from picinspector.serve.answers import Reference
from picinspector.serve.problems import RequestError, busy, too_large
from picinspector.serve.settings import Rules
from picinspector.storage import redact
from picinspector.text import one_line
from picinspector.web import fetch_url

#: A field of `multipart/form-data`.
FIELD = "photo"
#: URLs fetched at once.
_FETCHES = 16
_NAME_CHARACTERS = 255
#: Of a JSON body: `,` `:` `[` `{`. Each may become an object a hundred times its size; base64 has none of them, and the
#: longest URL and name have 2303 characters.
_SIGNS = 4096

#: A photo, and what to call it.
Photo = tuple[bytes, str]


class _InMemory(MultiPartParser):
    """Starlette's parser, but no photo goes to disk: 0 is no limit, and the gate has counted the bytes."""

    spool_max_size = 0


class Intake:
    """Reads requests. What they make the service hold beside their body is told to the gate (`request.state.hold`)."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._fetchers, self._free = ThreadPoolExecutor(_FETCHES, "fetch"), threading.Semaphore(_FETCHES)

    async def one(self, request: Request) -> Photo:
        """The photo of a request for one.

        Raises:
            RequestError: it has none that can be had.
        """
        if _content_type(request) == "application/json":
            return await self._referred(request)
        [photo] = await self.many(request, 1)
        return photo

    async def many(self, request: Request, most: int) -> list[Photo]:
        """The photos of a form.

        Raises:
            RequestError: it is none, has none, or more than `most`, or something else.
        """
        if _content_type(request) != "multipart/form-data":
            kinds = "multipart/form-data" if most > 1 else "multipart/form-data or application/json"
            raise RequestError(415, "unsupported_media_type", f"send the photo as {kinds}")
        try:
            form = await _InMemory(request.headers, request.stream(), max_files=most, max_fields=0).parse()
        except MultiPartException as error:
            raise _invalid(f"{one_line(error.message)} Send 1 to {most} files in fields named {FIELD}") from None
        except UnicodeError:
            raise _invalid("the names in the form are not of the charset that the content type tells") from None
        try:
            photos = []
            for field, part in form.multi_items():
                if field != FIELD or not isinstance(part, UploadFile):
                    raise _invalid(f"the form has a field that is not named {FIELD}")
                if (part.size or 0) > self._rules.limits.max_bytes:
                    raise too_large("a photo", self._rules.limits.max_bytes)
                photos.append((await part.read(), one_line(part.filename or "")[:_NAME_CHARACTERS]))
        finally:
            await form.close()
        if not photos:
            raise _invalid(f"the form has no photo; send 1 to {most} in fields named {FIELD}")
        return photos

    async def _referred(self, request: Request) -> Photo:
        """The photo that a JSON body names or holds."""
        # In a thread: megabytes take it a while, in which others are answered.
        wanted, data = await asyncio.to_thread(_parse, await request.body())
        name = one_line(wanted.name)
        if wanted.url is not None:
            path = wanted.url.partition("#")[0].partition("?")[0]
            data, name = await self._fetch(wanted.url, request), name or one_line(redact(path))
        request.state.hold(len(data))
        if len(data) > self._rules.limits.max_bytes:
            raise too_large("the photo", self._rules.limits.max_bytes)
        return data, name

    async def _fetch(self, url: str, request: Request) -> bytes:
        if not self._free.acquire(blocking=False):
            raise busy("too many URLs are being fetched; come again")
        left_s = max(0.1, request.state.deadline - asyncio.get_running_loop().time())
        work = self._fetchers.submit(fetch_url, url, self._rules.limits.max_bytes, left_s, self._rules.allow_private)
        work.add_done_callback(lambda _: self._free.release())  # which is later, where the client leaves
        try:
            return await asyncio.wrap_future(work)
        except PhotoError as error:
            raise _unfetched(error) from None
        except UsageError as error:
            raise _invalid(one_line(str(error))) from None


def refusal(kind: str, message: str) -> RequestError:
    """What is wrong with a photo, as an answer."""
    if kind in (ErrorKind.TOO_MANY_BYTES, ErrorKind.TOO_MANY_PIXELS):
        return RequestError(413, kind, message)
    return RequestError(500 if kind == ErrorKind.INTERNAL else 422, kind, message)


def _unfetched(error: PhotoError) -> RequestError:
    """Why a URL was not fetched. What may well pass is the other server's, and not the client's."""
    if error.kind == ErrorKind.THROTTLED:
        return busy(error.message, error.kind.value)
    passing = {ErrorKind.TIMEOUT: 504, ErrorKind.CONNECTION: 502}
    if error.kind in passing:
        return RequestError(passing[error.kind], error.kind.value, error.message)
    return refusal(error.kind.value, error.message)


def _invalid(message: str) -> RequestError:
    return RequestError(422, "invalid_request", message)


def _content_type(request: Request) -> str:
    kind: bytes = parse_options_header(request.headers.get("content-type", ""))[0]
    return kind.decode("latin-1").lower()


def _parse(body: bytes) -> tuple[Reference, bytes]:
    """What a JSON body asks for, and the photo if it is in there."""
    if sum(body.count(sign) for sign in (b",", b":", b"[", b"{")) > _SIGNS:
        raise _invalid('send {"url": "..."} or {"base64": "..."}, and no more than that')
    try:
        wanted = Reference.model_validate_json(body)
    except ValidationError as error:  # what was sent is not repeated
        found = error.errors(include_url=False, include_context=False, include_input=False)[:3]
        problems = (f"{'.'.join(str(part)[:50] for part in one['loc'])}: {one['msg']}".strip(": ") for one in found)
        raise _invalid(one_line("; ".join(problems))[:500]) from None
    if (wanted.url is None) == (wanted.base64 is None):
        raise _invalid('give one of "url" and "base64"')
    try:
        return wanted, base64.b64decode(wanted.base64 or "", validate=True)
    except (binascii.Error, ValueError):
        raise _invalid("base64: cannot be decoded") from None
