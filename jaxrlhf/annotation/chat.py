"""Questions to a language model behind an OpenAI-style HTTP address, with bounded retries.

Every wait is bounded: each call, the pauses between calls, and their number. Transient failures (a timeout, a broken
connection, 408, 409, 425, 429, 5xx, a reply that is not a chat completion) are retried with exponential backoff and
jitter. Other failures raise at once, with a one-sentence message. The API key is sent in the request's header and
appears nowhere else.
"""

import contextlib
import email.utils
import functools
import json
import random
import ssl
import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import httpx

from jaxrlhf.annotation.concurrency import CancelledError, call_with_timeout
from jaxrlhf.annotation.verdict import Reply

MAX_REPLY_BYTES = 1 << 20
"""Longer replies are cut."""
MAX_QUOTED_CHARACTERS = 200
"""Length at which a server's text is cut in error messages."""
TRANSIENT = (408, 409, 425, 429)
"""Statuses below 500 that may pass: a timeout, a conflict, too early, too many requests."""
TOKENS_NAMES = ("max_tokens", "max_completion_tokens")
"""Names that servers have for the limit on a reply's tokens."""
FINISHED = {"max_tokens": "length", "max_output_tokens": "length"}
"""Other names of the reason that a reply was cut off."""
FILTERED = ("content_filter", "refusal", "safety", "SAFETY")
"""Reasons to end a reply that are a refusal."""
# Not the global generator, whose draws belong to the user's experiment.
_JITTER = random.Random()


class JudgeError(OSError):
    """A judge failed; the message says why, and which labels were kept."""


class BudgetError(JudgeError):
    """The limit on the number of calls is reached."""


class _TransientError(Exception):
    """A failure worth retrying, perhaps after a pause in seconds that the server asked for."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Limits(NamedTuple):
    """Limits on calls, retries and waiting.

    Attributes:
        calls: HTTP calls in total, retries included.
        retries: further calls after a transient failure.
        timeout: seconds of one call, from DNS look-up to the last byte.
        first_pause: seconds before the first retry; doubled for each further one.
        longest_pause: upper bound on a pause in seconds, even where the server asks for more.
    """

    calls: int = 100_000
    retries: int = 6
    timeout: float = 120.0
    first_pause: float = 0.5
    longest_pause: float = 60.0

    def check(self) -> "Limits":
        """Returns itself.

        Raises:
            ValueError: a limit is out of range.
        """
        if self.calls < 1 or self.retries < 0 or not 0 < self.timeout < float("inf"):
            raise ValueError("A judge needs at least one call, retries of 0 or more and a positive, finite timeout.")
        if not 0 <= self.first_pause <= self.longest_pause < float("inf"):
            raise ValueError("Pauses before retries must be 0 or more and finite, and the first not above the longest.")
        return self


class Request(NamedTuple):
    """What is asked of the model besides the question.

    Attributes:
        max_tokens: of a reply.
        tokens_name: the parameter's name, as some models know `max_completion_tokens` only.
        temperature: of the reply; None leaves it to the server, as some models refuse any but their own.
    """

    max_tokens: int = 1024
    tokens_name: str = TOKENS_NAMES[0]
    temperature: float | None = 0.0

    def body(self, model: str, question: str) -> bytes:
        """Returns the request in JSON."""
        fields: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": question}]}
        if self.temperature is not None:
            fields["temperature"] = int(self.temperature) if self.temperature == 0 else self.temperature
        # json.dumps escapes to ASCII, so lone surrogates survive.
        return json.dumps(fields | {self.tokens_name: self.max_tokens}).encode()

    def check(self) -> "Request":
        """Returns itself.

        Raises:
            ValueError: a value is out of range.
        """
        if self.max_tokens < 1:
            raise ValueError(f"A judge needs at least one token to answer with, got {self.max_tokens}.")
        if not self.tokens_name.isidentifier() or self.tokens_name in ("model", "messages", "temperature"):
            known = " or ".join(TOKENS_NAMES)
            raise ValueError(f"The limit on a judge's tokens is named {known}, not {self.tokens_name!r}.")
        if self.temperature is not None and not 0 <= self.temperature < float("inf"):
            raise ValueError(f"A judge's temperature must be 0 or more, got {self.temperature:g}.")
        return self


class Chat:
    """A chat model at an address. Thread-safe.

    Attributes:
        calls: HTTP calls made so far.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None, request: Request, limits: Limits):
        """Takes the address without `/chat/completions`.

        Raises:
            ValueError: address, key, request or a limit is invalid. The message shows neither key nor password.
        """
        self.url, self.model = checked_address(base_url) + "/chat/completions", model
        self.calls, self._limits, self.request = 0, limits.check(), request.check()
        self._key = _checked_key(api_key)
        self._lock = threading.Lock()
        if not model:
            raise ValueError("A judge needs a model's name.")

    def connect(self) -> httpx.Client:
        """Returns an HTTP client; the caller closes it."""
        # With compression a small reply could expand into a huge one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # The caller limits concurrency; an abandoned call holds its connection for a while.
        connections = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.Client(headers=headers, timeout=self._limits.timeout, limits=connections, verify=_certificates())

    def complete(self, client: httpx.Client, question: str, stopping: threading.Event) -> Reply:
        """Returns the model's reply.

        Args:
            client: from `connect`.
            question: the user's message.
            stopping: once it is set, no further call is made.

        Raises:
            JudgeError: no reply after all retries, or a failure that no retry would change.
            BudgetError: the limit on calls is reached.
            CancelledError: `stopping` was set before there was a reply.
        """
        encoded, limits, reason = self.request.body(self.model, question), self._limits, ""
        for attempt in range(limits.retries + 1):
            if stopping.is_set():
                raise CancelledError
            self._count()
            try:
                return self._call(client, encoded)
            except _TransientError as error:
                reason, requested = str(error), error.pause
            if attempt < limits.retries:
                backoff = limits.first_pause * 2.0 ** min(attempt, 60) * _JITTER.uniform(0.5, 1.0)
                stopping.wait(min(limits.longest_pause, max(backoff, requested)))
        raise JudgeError(
            f"The judge {self.model} at {self.url} gave no answer in {limits.retries + 1} calls; the last: {reason}."
        )

    def _count(self) -> None:
        with self._lock:
            if self.calls >= self._limits.calls:
                raise BudgetError(f"The ceiling of {self._limits.calls} calls to the judge {self.model} is reached.")
            self.calls += 1

    def _call(self, client: httpx.Client, body: bytes) -> Reply:
        timeout = self._limits.timeout
        try:
            status, headers, reply = call_with_timeout(timeout, lambda: _post(client, self.url, body))
        except (TimeoutError, httpx.TimeoutException):
            raise _TransientError(f"no reply within {timeout:g} s") from None
        except (httpx.HTTPError, httpx.StreamError, OSError, RuntimeError) as error:
            raise _TransientError(self.quotable(f"{type(error).__name__}: {error}")) from None
        if status in TRANSIENT or status >= 500:
            raise _TransientError(f"status {status}{self._server_message(reply)}", _retry_after(headers))
        if not 200 <= status < 300:
            message = self._server_message(reply)
            raise JudgeError(
                f"The judge {self.model} at {self.url} refused with status {status}{message}.{self._remedy(message)}"
            )
        try:
            return completion(reply)
        except ValueError as error:
            raise _TransientError(f"{error}{self._server_message(reply)}") from None

    def _server_message(self, reply: bytes) -> str:
        text = reply[:MAX_REPLY_BYTES].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            text = str(json.loads(text)["error"]["message"])
        quoted = self.quotable(text)
        return f" ({quoted})" if quoted else ""

    def _remedy(self, message: str) -> str:
        name = self.request.tokens_name
        other = TOKENS_NAMES[name == TOKENS_NAMES[0]]
        if other in message:
            return f" Name the limit on its tokens {other} (--judge-tokens-name, tokens_name=)."
        if "temperature" in message:
            return " Give it another temperature, or none (--judge-temperature, temperature=)."
        return ""

    def quotable(self, text: str, *, end: bool = False) -> str:
        """Returns a server's text as part of one sentence: on one line, without the key, its beginning or its end."""
        # Servers quote the key that they reject. Redact before cutting, or part of it could remain.
        redacted = text.replace(self._key, "(the key)") if self._key else text
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in redacted).split())
        return (line[-MAX_QUOTED_CHARACTERS:] if end else line[:MAX_QUOTED_CHARACTERS]).rstrip(" .")


@functools.cache
def _certificates() -> ssl.SSLContext:
    # Reading them takes longer than a call to a local judge: do it once per process.
    return httpx.create_ssl_context()


def completion(reply: bytes) -> Reply:
    """Returns the first choice of a chat completion.

    Raises:
        ValueError: the reply is not a chat completion.
    """
    try:
        choices = json.loads(reply)["choices"]
        if not choices:
            return Reply("")
        message, finish = choices[0]["message"], choices[0].get("finish_reason")
        content, refusal = message.get("content"), message.get("refusal")
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("a reply that is no chat completion") from None
    if isinstance(content, list):
        # Parts, of which those of text are joined.
        content = "".join(
            part["text"] for part in content if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    if not isinstance(content, str | None):
        raise ValueError("a reply whose content is no text")
    finish = finish if isinstance(finish, str) else ""
    return Reply(content or "", FINISHED.get(finish, finish), refused=bool(refusal) or finish in FILTERED)


def checked_address(url: str) -> str:
    """Returns an HTTP address without a trailing slash.

    Raises:
        ValueError: it is not one, or has more than host and path. The message does not quote what may be a secret.
    """
    try:
        parts = httpx.URL(url)
    except (httpx.InvalidURL, ValueError):
        raise ValueError("The judge's address is no URL; write http://HOST:PORT/v1.") from None
    if parts.scheme not in ("http", "https") or not parts.host:
        raise ValueError("The judge's address must begin with http:// or https:// and name a host.")
    if parts.userinfo or parts.query or parts.fragment:
        raise ValueError("The judge's address is a host and a path; give the key apart from it.")
    return str(parts).rstrip("/")


def _checked_key(key: str | None) -> str:
    # Environment variables read from a file often end in a line break.
    key = (key or "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError("The judge's API key holds a blank or a letter that no HTTP header may hold.")
    return key


def _post(client: httpx.Client, url: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
    reply = bytearray()
    with client.stream("POST", url, content=body) as response:
        for chunk in response.iter_bytes():
            reply += chunk
            if len(reply) > MAX_REPLY_BYTES:
                break
        return response.status_code, response.headers, bytes(reply)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that the server asks to wait, sent as a number or a date; 0 without the header."""
    value = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if value.strip().replace(".", "", 1).isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    return 0.0
