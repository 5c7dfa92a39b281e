"""Simulated labellers: browsers' requests to a labelling page, from a process of its own.

    python -m benchmarks.labellers ADDRESS --labellers 200 --per-minute 5000 --seconds 60

Each labeller opens the page, labels the pair that it is shown after a random time, and asks for the page's state every two
seconds in between, as the page's script does. Prints one JSON object: the seconds that each request took, from when it was
sent to when its answer was read, and the number of labels that the page said were saved.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import secrets
import time
import urllib.parse
from typing import Any

import tyro

POLL = 2.0
"""Seconds between two requests for the page's state."""
RAMP = 5.0
"""Seconds over which labellers arrive; nothing is measured until then."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Who labels."""

    address: tyro.conf.Positional[str]
    """Of the page, with its token."""
    labellers: int = 200
    per_minute: float = 5000.0
    """Labels of all together."""
    seconds: float = 60.0
    """Measured time."""
    seed: int = 0


class Browser:
    """One connection that is kept open, and the cookie that it was given."""

    def __init__(self, address: str):
        """Connects at the first request."""
        parts = urllib.parse.urlsplit(address)
        self._host, self._path = parts.netloc, f"{parts.path}?{parts.query}"
        self._address, self._cookie = (parts.hostname, parts.port), ""
        self._streams: Any = None

    async def open(self) -> None:
        """Opens the page, which sets the cookie."""
        status, headers, _ = await self._request("GET", self._path, b"")
        assert status == 200, f"the page answered {status}"
        self._cookie = headers["set-cookie"].partition(";")[0]

    async def post(self, name: str, fields: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Returns the status and the JSON that a request of the page's script is answered with."""
        status, _, body = await self._request("POST", f"/api/{name}", json.dumps(fields).encode())
        return status, json.loads(body)

    async def close(self) -> None:
        """Ends the connection."""
        if self._streams is not None:
            self._streams[1].close()
            with contextlib.suppress(OSError):
                await self._streams[1].wait_closed()

    async def _request(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        for _ in range(3):
            try:
                return await self._try(method, path, body)
            except (ConnectionError, asyncio.IncompleteReadError):
                # A server may close a connection that was idle; a browser opens another and sends the request again.
                await self.close()
                self._streams = None
        raise ConnectionError("the page closed three connections in a row")

    async def _try(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection(*self._address)
        reader, writer = self._streams
        headers = {"host": self._host, "origin": f"http://{self._host}", "cookie": self._cookie}
        headers |= {"content-type": "application/json", "content-length": str(len(body))}
        lines = [f"{method} {path} HTTP/1.1", *(f"{key}: {value}" for key, value in headers.items()), "", ""]
        writer.write("\r\n".join(lines).encode() + body)
        status, *rest = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        found = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)}
        return int(status.split()[1]), found, await reader.readexactly(int(found["content-length"]))


async def label(config: Config, number: int, begin: float, seconds: dict[str, list[float]]) -> dict[str, int]:
    """Labels until the time is up; returns how many labels were saved, and how many requests were refused."""
    source, browser = random.Random(f"{config.seed} {number}"), Browser(config.address)
    tab, end, counts = secrets.token_hex(8), begin + config.seconds, {"saved": 0, "refused": 0}
    mean = 60 * config.labellers / config.per_minute
    await asyncio.sleep(RAMP * number / config.labellers)
    await browser.open()

    async def ask(name: str, **fields: Any) -> dict[str, Any]:
        sent = time.monotonic()
        status, answer = await browser.post(name, {"tab": tab, **fields})
        if sent >= begin:
            seconds[name].append(time.monotonic() - sent)
        counts["refused"] += status != 200
        return answer if status == 200 else {"pair": None}

    async def wait_until(when: float, lease: str) -> None:
        while (left := when - time.monotonic()) > 0:
            await asyncio.sleep(min(left, POLL))
            if left > POLL:
                await ask("state", lease=lease)

    pair, due = (await ask("next"))["pair"], time.monotonic()
    while True:
        # By a clock of its own, so that slow answers do not thin out the labels.
        due += source.expovariate(1 / mean)
        if due >= end:
            break
        await wait_until(due, "" if pair is None else pair["lease"])
        if pair is None:
            pair = (await ask("next"))["pair"]
            continue
        choice = source.choice(("left", "right", "tie"))
        answer = await ask("label", lease=pair["lease"], choice=choice, note="", seconds=mean)
        counts["saved"] += "saved" in answer
        pair = answer["pair"]
    await browser.close()
    return counts


async def run(config: Config) -> dict[str, Any]:
    """Returns what all labellers measured."""
    seconds: dict[str, list[float]] = {"next": [], "label": [], "state": []}
    begin = time.monotonic() + RAMP
    counts = await asyncio.gather(*(label(config, number, begin, seconds) for number in range(config.labellers)))
    return {"seconds": seconds} | {name: sum(each[name] for each in counts) for name in ("saved", "refused")}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run(tyro.cli(Config)))))
