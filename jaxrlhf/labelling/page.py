"""A page that runs: its secret, its address, and the thread that serves it."""

import fcntl
import os
import pathlib
import secrets
import socket
import threading
from typing import Any

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.guard import LOOPBACK, Pass
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.server import MISSING, make_app

PORT = 8377
"""Where the page is served unless told otherwise; always the same, so that open pages find a restarted server."""


class Page:
    """Serves a queue from a thread of its own, from `start` to `stop`.

    Attributes:
        queue: of pairs.
        board: what is shown beside them.
        address: with the token; None before `start`.
    """

    @staticmethod
    def check() -> None:
        """Raises ValueError where the packages of the page are missing."""
        try:
            import starlette  # noqa: F401  # pyright: ignore[reportUnusedImport]
            import uvicorn  # noqa: F401  # pyright: ignore[reportUnusedImport]
        except ImportError:
            raise ValueError(MISSING) from None

    def __init__(self, queue: Queue, board: Board, *, host: str = "127.0.0.1", port: int = PORT):
        """Takes hold of the queue's journal; a page whose server was killed is served at the same address again.

        Args:
            queue: of pairs; its store is a file.
            board: what is shown beside them.
            host: address to listen on; others than this machine's own let other machines in.
            port: 0 is any that is free.

        Raises:
            ValueError: the packages of the page are missing, or another process serves the journal.
        """
        self.check()
        path = queue.store.path
        assert path is not None
        self.queue, self.board, self.address = queue, board, None
        self._host, self._port = host, port
        self._token, self._lock = _open_secret(path)
        self._server: Any = None
        self._thread: threading.Thread | None = None

    def start(self) -> str:
        """Begins to serve; returns the address to open, which holds the token.

        Raises:
            ValueError: the port is taken, or the host is not this machine's.
        """
        import uvicorn

        listener = _listen(self._host, self._port)
        port = listener.getsockname()[1]
        app = make_app(
            self.queue,
            self.board,
            Pass(self._token),
            cookie=f"jaxrlhf-{port}",
            local_only=self._host in LOOPBACK,
        )
        # Nothing is logged: addresses hold the token.
        config = uvicorn.Config(
            app,  # pyright: ignore[reportArgumentType]
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()
        name = f"[{self._host}]" if ":" in self._host else self._host
        shown = "127.0.0.1" if name == "0.0.0.0" else "[::1]" if name == "[::]" else name
        self.address = f"http://{shown}:{port}/?token={self._token}"
        return self.address

    def stop(self) -> None:
        """Ends serving; may be called again."""
        self.board.ended = True
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(5)
        self._lock.close()

    def __enter__(self) -> "Page":
        self.start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.stop()


def _open_secret(journal: pathlib.Path) -> tuple[str, Any]:
    """Returns the token of a journal's page, from a file that its owner alone can read, and the file, locked."""
    path = journal.with_name(f"{journal.name}.token")
    try:
        descriptor = _open_private(path)
    except OSError as error:
        raise ValueError(f"The page's token cannot be kept in {path} ({error.strerror}); use another folder.") from None
    stream = open(descriptor, "r+", encoding="ascii", errors="replace")  # noqa: SIM115
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.close()
        raise ValueError(
            f"Another process serves the labels of {journal}; open its page, or end it first, or name another journal."
        ) from None
    token = stream.read().strip()
    if len(token) < 32:
        token = secrets.token_urlsafe(32)
        stream.seek(0)
        stream.truncate()
        stream.write(token)
        stream.flush()
    return token, stream


def _open_private(path: pathlib.Path) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o600)
    os.fchmod(descriptor, 0o600)
    return descriptor


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    # A server that was killed leaves connections behind, which must not keep the next one waiting.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(1024)
    except (OSError, OverflowError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or error
        raise ValueError(
            f"The page cannot be served at {host}, port {port} ({reason}); give another --host or --port."
        ) from None
    return listener
