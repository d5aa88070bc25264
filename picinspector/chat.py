"""An OpenAI-compatible endpoint asked one question at a time, with limits on an answer's time, size and price.

The `openai` package sends, waits and tries again; here is what it leaves open: an end to an answer that drips or
swells, a ceiling on what all of them cost, and errors in our own words. Nothing of a server's error is repeated,
because it may echo the key or the picture.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from picinspector.errors import ErrorKind, PhotoError, UsageError
from picinspector.storage import is_signed, redact

if TYPE_CHECKING:
    import httpx2
    import openai

KEY_VARIABLE = "PICINSPECTOR_CRITIC_KEY"

#: An answer within the critic's limits has under 4 kB; the rest is room for a wordy envelope.
_MAX_ANSWER_BYTES = 256 * 1024

#: Tokens that text and picture may cost before the first answer tells: gpt-4o-mini counts 25,501 for a picture of
#: 768 x 768 px (2,833 and 5,667 for each of four tiles; OpenAI's pricing of vision), the most of the usual models.
_UNSEEN_TOKENS_IN = 32_000
#: After that, this many times the most seen so far: a panorama has a tenth of a square's pixels, but the same text.
_TOKENS_IN_MARGIN = 4

#: So many photos in a row that the endpoint failed: it is not there, and the others are not tried.
GIVE_UP_AFTER = 10

#: What a status means where it is not the photo's fault, and where no other photo would fare better.
_NO_USE = {
    401: f"it refuses the key; set {KEY_VARIABLE} to one of its own",
    402: "it wants to be paid; see to the account",
    403: f"it refuses the key for this model; set {KEY_VARIABLE} to one that may use it",
    404: "there is no such address or model; check --critic-url (with its version, like /v1) and --critic-model",
}
#: `error.code` of OpenAI's API where it will not speak of a photo, and of Azure's.
_REFUSAL_CODES = frozenset({"content_policy_violation", "content_filter", "responsibleaipolicyviolation"})


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Whom to ask, and how patiently.

    Attributes:
        url: base URL of an OpenAI-compatible API, with its version: `https://api.openai.com/v1`.
        model: as the endpoint calls it.
        key: bearer token; empty for a server that wants none.
        timeout_s: for one whole answer.
        retries: after time-outs, broken connections, HTTP 408, 409, 429 and 5xx, with the pauses of the `openai`
            package: what `Retry-After` says up to two minutes, else exponential from half a second.
        concurrency: requests at once.
        max_tokens: of one answer.

    Raises:
        UsageError: the URL or the key cannot be used.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)
    timeout_s: float = 60.0
    retries: int = 2
    concurrency: int = 4
    max_tokens: int = 1000

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")) or not self.url.split("://", 1)[1].strip("/"):
            raise UsageError(f"--critic-url {redact(self.url)} is no address; give one like https://api.openai.com/v1")
        if is_signed(self.url):
            raise UsageError(f"--critic-url {redact(self.url)} holds a key; put it into {KEY_VARIABLE} instead")
        if not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise UsageError(f"{KEY_VARIABLE} is no key: it holds spaces, line breaks or other letters than ASCII")


@dataclass(frozen=True, slots=True)
class Prices:
    """What tokens cost, USD per million, and what all of them may cost together.

    Raises:
        UsageError: a ceiling without prices, one price without the other, or a negative number.
    """

    per_million_in: float | None = None
    per_million_out: float | None = None
    max_cost_usd: float | None = None

    def __post_init__(self) -> None:
        known = [price is not None for price in (self.per_million_in, self.per_million_out)]
        if any(known) and not all(known):
            raise UsageError("give both --price-in and --price-out, USD per million tokens")
        if self.max_cost_usd is not None and not all(known):
            raise UsageError("--max-cost needs --price-in and --price-out, USD per million tokens of this model")
        for value in (self.per_million_in, self.per_million_out, self.max_cost_usd):
            if value is not None and not (math.isfinite(value) and value >= 0):
                raise UsageError(f"{value} is no price: give USD, 0 or more")

    @property
    def known(self) -> bool:
        """True where a cost can be told."""
        return self.per_million_in is not None and self.per_million_out is not None

    def cost_usd(self, tokens_in: int, tokens_out: int) -> float | None:
        """What these tokens cost; None where prices are not known."""
        if self.per_million_in is None or self.per_million_out is None:
            return None
        return (tokens_in * self.per_million_in + tokens_out * self.per_million_out) / 1e6


def key_from_environment() -> str:
    """The endpoint's key; empty if none is set. The key of other programs (`OPENAI_API_KEY`) is left alone."""
    return os.environ.get(KEY_VARIABLE, "").strip()


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back.

    Attributes:
        text: what the model wrote; empty where there is nothing to use.
        tokens: prompt and answer tokens as reported; None where they were not.
        problem: why there is nothing to use, in our words; may be told to the model.
        refused: the model will not speak of this.
    """

    text: str = ""
    tokens: tuple[int, int] | None = None
    problem: str = ""
    refused: bool = False


# --- reading ---------------------------------------------------------------------------------------------------------


class _Message(BaseModel):
    content: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Completion(BaseModel):
    """What is read of a chat completion."""

    choices: list[_Choice]
    usage: Any = None


class _Usage(BaseModel):
    """Tokens of an answer."""

    prompt_tokens: Annotated[int, Field(ge=0, le=10_000_000)]
    completion_tokens: Annotated[int, Field(ge=0, le=10_000_000)]


def _read_answer(body: bytes, max_tokens: int) -> Answer:
    """What is in a chat completion."""
    tokens = _read_usage(body)
    try:
        completion = _Completion.model_validate_json(body)
    except ValidationError:
        return Answer(tokens=tokens, problem="the response is no chat completion")
    if not completion.choices:
        return Answer(tokens=tokens, problem="the response has no choices")
    choice = completion.choices[0]
    if choice.finish_reason == "content_filter" or choice.message.refusal:
        return Answer(tokens=tokens, refused=True)
    if choice.finish_reason == "length":
        return Answer(tokens=tokens, problem=f"the answer was cut off at {max_tokens} tokens (--max-tokens)")
    if not choice.message.content:
        return Answer(tokens=tokens, problem="the answer is empty")
    return Answer(choice.message.content, tokens)


def _read_usage(body: bytes) -> tuple[int, int] | None:
    """Prompt and answer tokens of a response; None where it does not say, or nonsense."""
    try:
        usage = _Usage.model_validate(_Completion.model_validate_json(body).usage)
    except ValidationError:
        return None
    return usage.prompt_tokens, usage.completion_tokens


# --- what it may cost -------------------------------------------------------------------------------------------------


class _Budget:
    """Money spent, and money held for answers that are on their way: never more than the ceiling together.

    Before each request the most that it can cost is held back; the answer's reported usage replaces it. A request that
    was cut off, or an answer without usage, counts as the most: it may well have been billed.
    """

    def __init__(self, prices: Prices, max_tokens: int) -> None:
        self._prices = prices
        self._ceiling = math.inf if prices.max_cost_usd is None else prices.max_cost_usd
        self._held: list[float] = []
        self._most_in, self._most_out = 0, max_tokens
        self._settled = asyncio.Condition()
        self.counted_usd = 0.0

    def _worst(self) -> float:
        return self._prices.cost_usd(_TOKENS_IN_MARGIN * self._most_in or _UNSEEN_TOKENS_IN, self._most_out) or 0.0

    def _fits(self, cost: float) -> bool:
        return self.counted_usd + sum(self._held) + cost <= self._ceiling

    def _over(self) -> PhotoError:
        left = max(0.0, self._ceiling - self.counted_usd)
        message = f"${left:.4f} of --max-cost ${self._ceiling:g} are left, one more may cost ${self._worst():.4f}"
        return PhotoError(ErrorKind.COST_CEILING, message)

    async def hold(self) -> float:
        """Hold back the most that one request can cost; waits where answers on their way may still make room.

        Raises:
            PhotoError: it could exceed the ceiling.
        """
        async with self._settled:
            while not self._fits(worst := self._worst()):
                if not self._held:
                    raise self._over()
                await self._settled.wait()
            self._held.append(worst)
            return worst

    async def settle(self, held: float, body: bytes | None) -> None:
        """Count what a response cost instead of what was held for it; nothing where there is no response."""
        usage = _read_usage(body) if body is not None else None
        async with self._settled:
            self._held.remove(held)
            if usage is not None:
                self._most_in, self._most_out = max(self._most_in, usage[0]), max(self._most_out, usage[1])
                self.counted_usd += self._prices.cost_usd(*usage) or 0.0
            elif body is not None:
                self.counted_usd += held
            self._settled.notify_all()

    def cut_off(self) -> None:
        """Count a request that broke off after it was sent.

        Raises:
            PhotoError: sending it again could exceed the ceiling.
        """
        self.counted_usd += self._worst()
        if not self._fits(0.0):
            raise self._over()


# --- asking -----------------------------------------------------------------------------------------------------------


class _UnusableError(Exception):
    """A response that is not read to its end. The message is ours."""


def _client(endpoint: Endpoint, budget: _Budget) -> openai.AsyncOpenAI:
    """The client of the `openai` package: it sends, waits and tries again.

    Raises:
        UsageError: the package is not installed.
    """
    try:
        import httpx2
        import openai
    except ImportError as error:
        raise UsageError("the critic needs extra packages: pip install 'picinspector[critic]'") from error

    class Bounded(httpx2.AsyncClient):
        """Ends an answer that takes too long or grows too large in all; time-outs of the library are for one read."""

        async def send(self, request: httpx2.Request, **options: Any) -> httpx2.Response:
            asked = request.headers
            request.headers = asked.copy()
            for name in [name for name in asked if name.startswith(("x-stainless-", "openai-"))]:
                del request.headers[name]  # the machine's system and versions, the user's organisation
            body, options["stream"] = bytearray(), True
            try:
                async with asyncio.timeout(endpoint.timeout_s):
                    response = await super().send(request, **options)
                    try:
                        # Nobody asked for compression, and 256 kB may hold 256 MB. Errors count without their text.
                        if response.headers.pop("content-encoding", "identity") != "identity" and response.is_success:
                            raise _UnusableError("the response is compressed")
                        async for part in response.aiter_raw():
                            body += part
                            if len(body) > _MAX_ANSWER_BYTES and response.is_success:
                                raise _UnusableError(f"the answer is larger than {_MAX_ANSWER_BYTES // 1024} kB")
                            if len(body) > _MAX_ANSWER_BYTES:
                                break
                    finally:
                        await response.aclose()
            except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout):
                raise
            except (httpx2.RequestError, TimeoutError, _UnusableError) as error:
                budget.cut_off()
                if isinstance(error, TimeoutError):  # as the library's own, which the client tries again
                    raise httpx2.ReadTimeout("the answer took too long", request=request) from error
                raise
            request.headers = asked  # the client reads its own marks in them
            return httpx2.Response(response.status_code, headers=response.headers, content=bytes(body), request=request)

    return openai.AsyncOpenAI(
        base_url=endpoint.url.rstrip("/").removesuffix("/chat/completions"),
        api_key=endpoint.key or "none",  # never the package's own default, the key of OPENAI_API_KEY
        timeout=endpoint.timeout_s,
        max_retries=endpoint.retries,
        default_headers={"Accept-Encoding": "identity"},
        # A redirect would take photo and key to another address than the one that was named.
        http_client=Bounded(follow_redirects=False, timeout=endpoint.timeout_s),
    )


class Chat:
    """One endpoint, asked again and again.

    Attributes:
        counted_usd: what counts towards the ceiling: reported usage, and the most that anything unreported can cost.
    """

    def __init__(self, endpoint: Endpoint, prices: Prices) -> None:
        self._endpoint = endpoint
        self._budget = _Budget(prices, endpoint.max_tokens)
        self._client = _client(endpoint, self._budget)
        self._failures: list[ErrorKind] = []  # since the last answer

    @property
    def counted_usd(self) -> float:
        """So far."""
        return self._budget.counted_usd

    async def close(self) -> None:
        """End its connections."""
        await self._client.close()

    async def ask(self, messages: list[Any], name: str, schema: Mapping[str, Any]) -> Answer:
        """Ask for one answer in JSON.

        Args:
            messages: as the API has them.
            name: of the schema.
            schema: JSON Schema that the answer should fit, in strict mode; not checked here.

        Raises:
            PhotoError: the endpoint gave none (`timeout`, `connection`, `rate_limited`, `server_error`, `rejected`), or
                it could cost more than is left (`cost_ceiling`). Without asking after `GIVE_UP_AFTER` such in a row.
            UsageError: it would give none to any photo.
        """
        if len(self._failures) >= GIVE_UP_AFTER:
            raise PhotoError(self._failures[-1], f"not asked: the critic failed {GIVE_UP_AFTER} photos in a row")
        held, body = await self._budget.hold(), None
        try:
            body = await self._send(messages, {"name": name, "strict": True, "schema": schema})
        except _UnusableError as error:
            return Answer(problem=str(error))
        except PhotoError as error:
            if error.kind in (ErrorKind.COST_CEILING, ErrorKind.REFUSED):
                raise
            self._failures.append(error.kind)
            raise
        finally:
            await self._budget.settle(held, body)
        self._failures.clear()
        return _read_answer(body, self._endpoint.max_tokens)

    async def _send(self, messages: list[Any], json_schema: Any) -> bytes:
        """One request, with the client's retries; the response's body."""
        import openai

        try:
            response = await self._client.chat.completions.with_raw_response.create(
                model=self._endpoint.model,
                messages=messages,
                response_format={"type": "json_schema", "json_schema": json_schema},
                max_completion_tokens=self._endpoint.max_tokens,
            )
        except openai.APITimeoutError:
            message = f"no whole answer within {self._endpoint.timeout_s:g} s, {self._tries}"
            raise PhotoError(ErrorKind.TIMEOUT, message) from None
        except openai.APIConnectionError:
            raise PhotoError(ErrorKind.CONNECTION, f"the connection failed or broke off, {self._tries}") from None
        except openai.APIStatusError as error:
            raise self._status_error(error.status_code, (error.code or "").lower()) from None
        return response.http_response.content

    def _status_error(self, status: int, code: str) -> PhotoError | UsageError:
        where = redact(self._endpoint.url)
        if status in _NO_USE:
            return UsageError(f"the critic at {where} answers HTTP {status}: {_NO_USE[status]}")
        if code == "insufficient_quota":
            return UsageError(f"the critic at {where} answers HTTP {status}: {_NO_USE[402]}")
        if 300 <= status < 400:
            return UsageError(f"the critic at {where} sends to another address (HTTP {status}); name that one")
        if code in _REFUSAL_CODES:
            return PhotoError(ErrorKind.REFUSED, f"the endpoint refused this photo (HTTP {status})")
        if status == 429:
            return PhotoError(ErrorKind.RATE_LIMITED, f"HTTP 429, too many requests, {self._tries}")
        if status >= 500:
            return PhotoError(ErrorKind.SERVER_ERROR, f"HTTP {status} from the critic, {self._tries}")
        return PhotoError(ErrorKind.REJECTED, f"HTTP {status}: the critic does not take this request")

    @property
    def _tries(self) -> str:
        return f"in {self._endpoint.retries + 1} tries" if self._endpoint.retries else "in one try"
