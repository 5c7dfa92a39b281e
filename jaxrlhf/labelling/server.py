"""The page's own small web application: four files, and four requests in JSON.

| request | what it says | what comes back |
|---|---|---|
| `next` | tab | the pair that the tab holds, or the next one |
| `label` | tab, lease, choice (one of `CHOICES`), note, seconds | whether the reward model agrees; the next pair |
| `undo` | tab, lease of a label | its pair; the label is withdrawn |
| `state` | tab, lease | nothing but what comes with every answer: counts, and the board |

Sides and choices are those of the screen; which completion stands where only the server knows.
"""

import json
import math
import pathlib
from collections.abc import Callable
from typing import Any

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.guard import Guard, Pass
from jaxrlhf.labelling.pairs import Turn
from jaxrlhf.labelling.people import agrees
from jaxrlhf.labelling.queue import CHOICES, Queue, QueueError, Shown

STATIC = pathlib.Path(__file__).parent / "static"
FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/text.js": ("text.js", "text/javascript; charset=utf-8"),
}
"""All that is served, by path: nothing is looked up in the file system."""
MAX_NOTE = 10_000
"""Characters of a note."""
MISSING = "The labelling page needs starlette and uvicorn, which are not installed; pip install 'jaxrlhf[labelling]'."


def make_app(queue: Queue, board: Board, page_pass: Pass, *, cookie: str, local_only: bool = True) -> Callable:
    """Returns the guarded ASGI application of a queue.

    Args:
        queue: of pairs.
        board: what is shown beside them.
        page_pass: the page's secret.
        cookie: name of the page's cookie.
        local_only: see `Guard`.

    Raises:
        ValueError: Starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.requests import Request
        from starlette.responses import Response
        from starlette.routing import Route
    except ImportError:
        raise ValueError(MISSING) from None

    def file_route(path: str, name: str, kind: str) -> Route:
        content = (STATIC / name).read_bytes()

        def serve(request: Request) -> Response:
            del request
            return Response(content, media_type=kind)

        return Route(path, serve, methods=["GET"])

    def api_route(name: str, handle: Callable[[str, dict[str, Any]], dict[str, Any]]) -> Route:
        def answer(person: str, body: bytes) -> tuple[int, dict[str, Any]]:
            try:
                return 200, handle(person, _fields(body))
            except QueueError as error:
                return 409, {"error": str(error)}
            except _BadRequestError as error:
                return 400, {"error": str(error)}

        async def serve(request: Request) -> Response:
            from starlette.concurrency import run_in_threadpool

            status, value = await run_in_threadpool(answer, request.scope["person"], await request.body())
            # ASCII: a text may hold lone surrogates, which UTF-8 cannot.
            return Response(json.dumps(value).encode("ascii"), status_code=status, media_type="application/json")

        return Route(f"/api/{name}", serve, methods=["POST"])

    files = [file_route(path, name, kind) for path, (name, kind) in FILES.items()]
    app = Starlette(routes=[*files, *(api_route(name, handle) for name, handle in handlers(queue, board).items())])
    return Guard(app, page_pass=page_pass, cookie=cookie, local_only=local_only)


def handlers(queue: Queue, board: Board) -> dict[str, Callable[[str, dict[str, Any]], dict[str, Any]]]:
    """Returns what answers each request: `(person, fields) -> JSON`."""

    def answer(person: str, tab: str, shown: Shown | None, **more: Any) -> dict[str, Any]:
        state = {"counts": queue.counts(person), "board": board.shown(), "undo": queue.undoable(person, tab)}
        return more | {"pair": None if shown is None else on_screen(shown)} | state

    def next_pair(person: str, fields: dict[str, Any]) -> dict[str, Any]:
        tab = _name(fields, "tab")
        return answer(person, tab, queue.next(person, tab))

    def label(person: str, fields: dict[str, Any]) -> dict[str, Any]:
        tab, lease, choice = _name(fields, "tab"), _name(fields, "lease"), fields.get("choice")
        if choice not in CHOICES:
            raise _BadRequestError(f"choice is one of {', '.join(CHOICES)}.")
        note, seconds = fields.get("note", ""), fields.get("seconds", 0)
        if not isinstance(note, str) or len(note) > MAX_NOTE:
            raise _BadRequestError(f"note is a text of at most {MAX_NOTE} characters.")
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or not math.isfinite(seconds):
            raise _BadRequestError("seconds is a number.")
        seconds = min(max(float(seconds), 0.0), 1e6)
        vote = queue.give(person, lease, choice, note=note, seconds=seconds)
        # Of a repetition nothing is told: it would say what the first label was.
        agreed = None if vote.repeat else agrees(vote)
        return answer(person, tab, queue.next(person, tab), saved=lease, agreed=agreed)

    def undo(person: str, fields: dict[str, Any]) -> dict[str, Any]:
        tab = _name(fields, "tab")
        return answer(person, tab, queue.undo(person, tab, _name(fields, "lease")))

    def state(person: str, fields: dict[str, Any]) -> dict[str, Any]:
        queue.renew(person, _name(fields, "lease", empty=True))
        return answer(person, _name(fields, "tab"), None)

    return {"next": next_pair, "label": label, "undo": undo, "state": state}


def on_screen(shown: Shown) -> dict[str, Any]:
    """Returns a pair as the page shows it; which completion is which, and what is expected, is left out."""
    lease, pair = shown
    sides = [pair.second, pair.first] if lease.swapped else [pair.first, pair.second]
    texts = {"prompt": pair.prompt, "left": sides[0], "right": sides[1]}
    return {"lease": lease.lease} | {name: [_turn(turn) for turn in turns] for name, turns in texts.items()}


def _turn(turn: Turn) -> dict[str, str]:
    fields = turn._asdict()
    return fields if turn.animation else {name: fields[name] for name in ("role", "text")}


class _BadRequestError(Exception):
    """A request that is not what the page sends."""


def _fields(body: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise _BadRequestError("A request is a JSON object.") from None
    if not isinstance(fields, dict):
        raise _BadRequestError("A request is a JSON object.")
    return fields


def _name(fields: dict[str, Any], name: str, *, empty: bool = False) -> str:
    value = fields.get(name, "" if empty else None)
    if empty and value is None:
        return ""
    if not isinstance(value, str) or not (value.isascii() and len(value) <= 64 and (value or empty)):
        raise _BadRequestError(f"{name} is a text of 1 to 64 ASCII characters.")
    return value
