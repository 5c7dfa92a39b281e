"""Questions to a language model behind an OpenAI-style HTTP address, asked with patience that ends.

Every wait has a bound: a call, the pauses between calls, their number. Failures that may pass (a timeout, a broken
connection, 429, 5xx, a reply that is no chat completion) are tried again after a pause that doubles each time, less a
random part, so that callers do not come back all at once. Others end the matter at once, in one sentence. The API key is
in the request's header and nowhere else.
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
from typing import NamedTuple

import httpx

from jaxrlhf.annotation.waiting import StoppedError, within

LARGEST_REPLY = 1 << 20
"""Bytes that are read of a reply."""
SHOWN = 200
"""Characters of a server's own words in a message."""
# Not the global one, whose draws belong to the user's experiment.
_JITTER = random.Random()


class JudgeError(OSError):
    """A judge gave no answer; the message says why, and what was kept."""


class BudgetError(JudgeError):
    """The ceiling on calls is reached."""


class _PassingError(Exception):
    """A failure that may pass by itself."""

    def __init__(self, reason: str, pause: float = 0.0):
        super().__init__(reason)
        self.pause = pause


class Limits(NamedTuple):
    """What a caller puts up with.

    Attributes:
        calls: HTTP calls in all, repeated ones included.
        retries: further calls for an answer that failed.
        timeout: seconds of one call, from the name's look-up to the last byte.
        first_pause: seconds before the first retry; doubled for each one after it.
        longest_pause: seconds that no pause exceeds, and be it that the server asks for more.
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


class Chat:
    """A model at an address. Safe for several threads.

    Attributes:
        calls: HTTP calls made so far.
    """

    def __init__(self, base_url: str, model: str, *, api_key: str | None, max_tokens: int, limits: Limits):
        """Takes the address up to and without `/chat/completions`.

        Raises:
            ValueError: address, key or a limit cannot be used. The message shows neither key nor password.
        """
        self.url, self.model = checked_address(base_url) + "/chat/completions", model
        self.calls, self._limits, self._max_tokens = 0, limits.check(), max_tokens
        self._key = _checked_key(api_key)
        self._lock = threading.Lock()
        if not model or max_tokens < 1:
            raise ValueError("A judge needs a model's name and at least one token to answer with.")

    def connect(self) -> httpx.Client:
        """Returns a client to make calls with; the caller closes it."""
        # Compression would let a small reply become a large one.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        # How many connections there are is the caller's affair: a call that was given up holds its own for a while.
        connections = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.Client(headers=headers, timeout=self._limits.timeout, limits=connections, verify=_certificates())

    def complete(self, client: httpx.Client, question: str, stopping: threading.Event) -> str:
        """Returns the model's words, empty where it has none (a refusal).

        Args:
            client: of `connect`.
            question: the user's message.
            stopping: once it is set, no further call is made.

        Raises:
            JudgeError: no answer after all retries, or one that no retry would change.
            BudgetError: the ceiling on calls is reached.
            StoppedError: `stopping` was set before there was an answer.
        """
        messages = [{"role": "user", "content": question}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self._max_tokens}
        # Escaped to ASCII, which holds whatever a text may hold.
        written, limits, reason = json.dumps(body).encode(), self._limits, ""
        for attempt in range(limits.retries + 1):
            if stopping.is_set():
                raise StoppedError
            self._count()
            try:
                return self._call(client, written)
            except _PassingError as error:
                reason, asked = str(error), error.pause
            if attempt < limits.retries:
                doubled = limits.first_pause * 2.0 ** min(attempt, 60) * _JITTER.uniform(0.5, 1.0)
                stopping.wait(min(limits.longest_pause, max(doubled, asked)))
        raise JudgeError(
            f"The judge {self.model} at {self.url} gave no answer in {limits.retries + 1} calls; the last: {reason}."
        )

    def _count(self) -> None:
        with self._lock:
            if self.calls >= self._limits.calls:
                raise BudgetError(f"The ceiling of {self._limits.calls} calls to the judge {self.model} is reached.")
            self.calls += 1

    def _call(self, client: httpx.Client, body: bytes) -> str:
        timeout = self._limits.timeout
        try:
            status, headers, reply = within(timeout, lambda: _post(client, self.url, body))
        except (TimeoutError, httpx.TimeoutException):
            raise _PassingError(f"no reply within {timeout:g} s") from None
        except (httpx.HTTPError, httpx.StreamError, OSError, RuntimeError) as error:
            raise _PassingError(self._shown(f"{type(error).__name__}: {error}")) from None
        if status == 429 or status >= 500:
            raise _PassingError(f"status {status}{self._said(reply)}", _retry_after(headers))
        if not 200 <= status < 300:
            raise JudgeError(f"The judge {self.model} at {self.url} refused with status {status}{self._said(reply)}.")
        try:
            return words_of(reply)
        except ValueError as error:
            raise _PassingError(f"{error}{self._said(reply)}") from None

    def _said(self, reply: bytes) -> str:
        text = reply[:LARGEST_REPLY].decode("utf-8", "replace")
        with contextlib.suppress(ValueError, RecursionError, KeyError, TypeError):
            text = str(json.loads(text)["error"]["message"])
        shown = self._shown(text)
        return f" ({shown})" if shown else ""

    def _shown(self, text: str) -> str:
        # Servers quote the key that they refuse. Taken out before anything is cut, or a part of it would be left.
        hidden = text.replace(self._key, "(the key)") if self._key else text
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in hidden).split())
        return line[:SHOWN].rstrip(" .")


@functools.cache
def _certificates() -> ssl.SSLContext:
    # Reading them takes longer than a call to a judge on the same machine: once a process.
    return httpx.create_ssl_context()


def words_of(reply: bytes) -> str:
    """Returns the text of a chat completion, empty where the model has none.

    Raises:
        ValueError: the reply is no chat completion.
    """
    try:
        choices = json.loads(reply)["choices"]
        content = choices[0]["message"].get("content") if choices else None
    except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
        raise ValueError("a reply that is no chat completion") from None
    if not isinstance(content, str | None):
        raise ValueError("a reply whose content is no text")
    return content or ""


def checked_address(url: str) -> str:
    """Returns an HTTP address without a slash at its end.

    Raises:
        ValueError: it is none, or holds more than host and path. The message does not show what may be a secret.
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
    # An environment variable that was read from a file often ends in a line break.
    key = (key or "").strip()
    if not all("!" <= letter <= "~" for letter in key):
        raise ValueError("The judge's API key holds a blank or a letter that no HTTP header may hold.")
    return key


def _post(client: httpx.Client, url: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
    reply = bytearray()
    with client.stream("POST", url, content=body) as response:
        for piece in response.iter_bytes():
            reply += piece
            if len(reply) > LARGEST_REPLY:
                break
        return response.status_code, response.headers, bytes(reply)


def _retry_after(headers: Mapping[str, str]) -> float:
    """Returns the seconds that the server asks to wait, given as such or as a date; 0 where it asks for none."""
    given = headers.get("retry-after", "")
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if given.strip().replace(".", "", 1).isdecimal():
            return float(given)
        return max(0.0, email.utils.parsedate_to_datetime(given).timestamp() - time.time())
    return 0.0
