"""Who may talk to the page: requests of the browser that was given its address, and of no other page or machine.

A request must pass all of these before anything of the page runs:

| checked | against |
|---|---|
| Host is this machine's | DNS rebinding: another site's name that suddenly leads here |
| GET, or POST of JSON whose Origin is Host and which is called same-origin | requests of other sites (CSRF) |
| a body of at most `MAX_BODY` bytes | exhausted memory |
| the token of the address, or the cookie that it earned | everybody else |

The answers forbid framing, scripts and styles other than the page's own files, and requests to any other address.
"""

import hashlib
import hmac
import ipaddress
import secrets
import socket
import urllib.parse
from collections.abc import Callable
from typing import Any

MAX_BODY = 64 * 1024
"""Bytes of a request's body."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), microphone=(), geolocation=()",
    "cache-control": "no-store",
}
"""Of every answer."""


class Pass:
    """The secret of a page, and the cookies that its holders are given.

    A cookie is the name of a person, drawn at random, and its signature: it stays valid over restarts, and nothing about
    it is stored.
    """

    def __init__(self, token: str):
        """The token is that of the page's address."""
        self._token = token.encode()

    def admits(self, token: str) -> bool:
        """Returns whether a token is the page's, in constant time."""
        return hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._token)

    def new_cookie(self) -> str:
        """Returns the cookie of a new person."""
        person = secrets.token_hex(8)
        return f"{person}.{self._signature(person)}"

    def person(self, cookie: str) -> str | None:
        """Returns the person of a cookie, None if the cookie is not one of this page's."""
        person, _, signature = cookie.partition(".")
        expected = self._signature(person)
        return person if hmac.compare_digest(signature.encode("utf-8", "surrogatepass"), expected.encode()) else None

    def _signature(self, person: str) -> str:
        return hmac.new(self._token, person.encode("utf-8", "surrogatepass"), hashlib.sha256).hexdigest()


class RefusedError(Exception):
    """A request that is refused, with the status and the sentence of the answer."""

    def __init__(self, status: int, reason: str):
        """See the class."""
        super().__init__(reason)
        self.status = status


class Guard:
    """ASGI middleware that lets only checked requests through; `scope["person"]` says whose they are."""

    def __init__(self, app: Callable, *, page_pass: Pass, cookie: str, local_only: bool):
        """Guards an app.

        Args:
            app: ASGI.
            page_pass: of the page.
            cookie: its name.
            local_only: whether Host must be this machine's loopback; else any address in numbers, or this machine's name.
        """
        self._app, self._pass, self._cookie, self._local_only = app, page_pass, cookie, local_only

    async def __call__(self, scope: dict[str, Any], receive: Callable, send: Callable) -> None:
        """Answers a request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            return
        fresh = ""
        try:
            headers = _single_headers(scope["headers"])
            self._check_origin(scope, headers)
            person, fresh = self._identify(scope, headers)
            body = await _read_body(headers, receive)
        except RefusedError as refused:
            await _refuse(send, refused)
            return

        async def receive_body() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send_with_headers(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_encoded(HEADERS)]
                if fresh:
                    value = f"{self._cookie}={fresh}; Path=/; HttpOnly; SameSite=Strict; Max-Age=31536000"
                    message["headers"].append((b"set-cookie", value.encode()))
            await send(message)

        await self._app(scope | {"person": person}, receive_body, send_with_headers)

    def _check_origin(self, scope: dict[str, Any], headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        if not _host_is_here(host, self._local_only):
            raise RefusedError(421, "This address is not served here; open the one that was printed.")
        if scope["method"] not in ("GET", "POST"):
            raise RefusedError(405, "Only GET and POST are served.")
        site = headers.get("sec-fetch-site", "none")
        if scope["method"] == "GET":
            # A link may lead to the page itself; nothing else is fetched from elsewhere.
            if site not in ("same-origin", "none") and scope["path"] != "/":
                raise RefusedError(403, "Other pages may not read this one.")
            return
        origin = urllib.parse.urlsplit(headers.get("origin", ""))
        if origin.scheme not in ("http", "https") or origin.netloc.lower() != host.lower():
            raise RefusedError(403, "This request comes from another page.")
        if site not in ("same-origin", "none"):
            raise RefusedError(403, "This request comes from another page.")
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RefusedError(415, "A request is JSON.")

    def _identify(self, scope: dict[str, Any], headers: dict[str, str]) -> tuple[str, str]:
        """Returns the person of a request, and the cookie to set if it is new."""
        person = None
        for part in headers.get("cookie", "").split(";"):
            name, _, value = part.strip().partition("=")
            if name == self._cookie:
                person = person or self._pass.person(value)
        if person is not None:
            return person, ""
        query = urllib.parse.parse_qs(scope["query_string"].decode("latin-1"))
        if scope["method"] == "GET" and scope["path"] == "/" and self._pass.admits(query.get("token", [""])[0]):
            cookie = self._pass.new_cookie()
            person = self._pass.person(cookie)
            assert person is not None
            return person, cookie
        raise RefusedError(403, "Open the whole address that was printed where the page was started, with its token.")


def _single_headers(raw: list[tuple[bytes, bytes]]) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in ((name.decode("latin-1").lower(), value.decode("latin-1")) for name, value in raw):
        if name in headers and name in ("host", "origin", "content-length", "content-type"):
            raise RefusedError(400, f"The header {name} is given twice.")
        headers[name] = f"{headers[name]}; {value}" if name in headers and name == "cookie" else value
    return headers


def _host_is_here(host: str, local_only: bool) -> bool:
    try:
        name = (urllib.parse.urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return False
    if name in LOOPBACK:
        return True
    try:
        # A name can be made to lead here, an address in numbers cannot.
        address = ipaddress.ip_address(name)
    except ValueError:
        return not local_only and name in (socket.gethostname().lower(), socket.getfqdn().lower())
    return address.is_loopback or not local_only


async def _read_body(headers: dict[str, str], receive: Callable) -> bytes:
    length = headers.get("content-length", "0")
    too_long = RefusedError(413, f"A request has at most {MAX_BODY} bytes.")
    if not (length.isascii() and length.isdigit()) or len(length) > 12 or int(length) > MAX_BODY:
        raise too_long
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RefusedError(400, "The request ended too early.")
        body += message.get("body", b"")
        if len(body) > MAX_BODY:
            raise too_long
        if not message.get("more_body"):
            return body


def _encoded(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode(), value.encode()) for name, value in headers.items()]


async def _refuse(send: Callable, refused: RefusedError) -> None:
    # The rest of a body that is too long is not read: the connection ends.
    headers = HEADERS | {"content-type": "text/plain; charset=utf-8", "connection": "close"}
    await send({"type": "http.response.start", "status": refused.status, "headers": _encoded(headers)})
    await send({"type": "http.response.body", "body": f"{refused}\n".encode()})
