"""The page's requests: who is let in, what is refused, and what the browser is told."""

import json
import socket
import stat

import pytest

pytest.importorskip("starlette", reason="the labelling page needs the extra labelling")
pytest.importorskip("uvicorn", reason="the labelling page needs the extra labelling")

import httpx
from starlette.testclient import TestClient

from jaxrlhf.labelling.board import Board
from jaxrlhf.labelling.guard import MAX_BODY, Pass
from jaxrlhf.labelling.page import Page
from jaxrlhf.labelling.pairs import make_pair
from jaxrlhf.labelling.queue import Queue
from jaxrlhf.labelling.server import FILES, make_app
from jaxrlhf.labelling.store import LabelStore

HERE = "http://127.0.0.1:8377"
TOKEN = "t" * 43
COOKIE = "jaxrlhf-8377"
API = ("next", "label", "undo", "state")


@pytest.fixture
def queue():
    queue = Queue(LabelStore(None), repeats=0.0)
    queue.add(make_pair("people", f"p{n}", f"a{n}", f"b{n}", forecast=0.9) for n in range(3))
    return queue


@pytest.fixture
def client(queue):
    return open_client(queue)


def open_client(queue, local_only=True):
    app = make_app(queue, Board("Title"), Pass(TOKEN), cookie=COOKIE, local_only=local_only)
    return TestClient(app, base_url=HERE, follow_redirects=False)


@pytest.fixture
def entered(client):
    """A client with the cookie."""
    assert client.get(f"/?token={TOKEN}").status_code == 200
    client.headers["origin"] = HERE
    return client


def test_the_token_earns_a_strict_cookie_that_opens_everything(client, queue):
    response = client.get(f"/?token={TOKEN}")
    (cookie,) = response.headers.get_list("set-cookie")
    assert cookie.startswith(f"{COOKIE}=") and TOKEN not in cookie
    for attribute in ("HttpOnly", "SameSite=Strict", "Path=/"):
        assert attribute in cookie
    for path in FILES:
        assert client.get(path).status_code == 200
    shown = client.post("/api/next", json={"tab": "1"}, headers={"origin": HERE}).json()["pair"]
    assert {shown["left"][0]["text"], shown["right"][0]["text"]} == {"a0", "b0"}
    assert "forecast" not in json.dumps(shown)
    assert TestClient(client.app, base_url=HERE, cookies=dict(client.cookies)).get("/").status_code == 200


@pytest.mark.parametrize("token", ["", TOKEN[:-1], TOKEN + "t", TOKEN.upper(), "\ud800", "%ff", "a" * 5000])
def test_no_other_token_does(client, token):
    for path in FILES:
        assert client.get(f"{path}?token={token}".encode("utf-8", "surrogatepass").decode("latin-1")).status_code == 403
    assert "set-cookie" not in client.get(f"/?token={token}".encode("utf-8", "replace").decode()).headers


@pytest.mark.parametrize("path", ["/page.js", "/api/next", "/none", "/page.html"])
def test_the_token_opens_the_page_alone(client, path):
    assert client.get(f"{path}?token={TOKEN}").status_code == 403


@pytest.mark.parametrize("cookie", ["", "ann", "ann.", "ann." + "0" * 64, f"{TOKEN}.{TOKEN}", ".", "é.é"])
def test_a_forged_cookie_opens_nothing(client, cookie):
    headers = {"cookie": f"{COOKIE}={cookie}".encode(), "origin": HERE.encode()}
    assert client.get("/", headers=headers).status_code == 403
    for name in API:
        assert client.post(f"/api/{name}", json={"tab": "1"}, headers=headers).status_code == 403


def test_nothing_happens_without_a_cookie(client, queue):
    for name in API:
        response = client.post(f"/api/{name}", json={"tab": "1", "lease": "x"}, headers={"origin": HERE})
        assert response.status_code == 403 and "lease" not in response.text
    assert not queue.store.leases()


FOREIGN = {
    "no-origin": {"origin": ""},
    "other-origin": {"origin": "http://evil.example"},
    "null-origin": {"origin": "null"},
    "other-port": {"origin": "http://127.0.0.1:8888"},
    "prefix": {"origin": f"{HERE}.evil.example"},
    "file": {"origin": "file://127.0.0.1:8377"},
    "cross-site": {"sec-fetch-site": "cross-site"},
    "same-site": {"sec-fetch-site": "same-site"},
    "form": {"content-type": "application/x-www-form-urlencoded"},
    "text": {"content-type": "text/plain"},
    "multipart": {"content-type": "multipart/form-data; boundary=x"},
    "rebound": {"host": "evil.example:8377", "origin": "http://evil.example:8377"},
    "rebound-lookalike": {"host": "127.0.0.1.evil.example", "origin": "http://127.0.0.1.evil.example"},
    "user": {"host": "127.0.0.1@evil.example", "origin": "http://127.0.0.1@evil.example"},
    "no-host": {"host": "", "origin": "http://"},
    "odd-host": {"host": "[::1", "origin": "http://[::1"},
    "other-machine": {"host": "10.0.0.5:8377", "origin": "http://10.0.0.5:8377"},
}


@pytest.mark.parametrize("headers", FOREIGN.values(), ids=FOREIGN)
def test_requests_of_other_pages_do_nothing(entered, queue, headers):
    headers = {"content-type": "application/json"} | headers
    for name in API:
        response = entered.post(f"/api/{name}", content=b'{"tab": "1"}', headers=headers)
        assert response.status_code in (403, 415, 421)
    assert not queue.store.leases()


@pytest.mark.parametrize("host", ["127.0.0.1:9000", "localhost:9000", "LOCALHOST", "[::1]:8377", "127.0.0.1"])
def test_a_tunnel_may_have_another_port(entered, host):
    headers = {"host": host, "origin": f"http://{host}"}
    assert entered.post("/api/next", json={"tab": "1"}, headers=headers).status_code == 200


def test_a_page_served_to_other_machines_takes_addresses_in_numbers_and_no_names(queue):
    client = open_client(queue, local_only=False)
    assert client.get(f"/?token={TOKEN}", headers={"host": "10.0.0.5:8377"}).status_code == 200
    assert client.get(f"/?token={TOKEN}", headers={"host": "evil.example"}).status_code == 421
    assert client.get(f"/?token={TOKEN}", headers={"host": socket.gethostname()}).status_code == 200


@pytest.mark.parametrize("method", ["PUT", "DELETE", "OPTIONS", "HEAD", "PATCH", "TRACE"])
def test_other_methods_are_refused(entered, method):
    response = entered.request(method, "/api/next")
    assert response.status_code == 405 and "access-control-allow-origin" not in response.headers


PATHS = ["/%2e%2e/guard.py", "/static/page.html", "//etc/passwd", "/page.js/..%2f..%2fguard.py",
         "/page.css%00", "/api", "/api/", "/api/next/x", "/.env", "/..%5cguard.py"]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_nothing_else_is_served(entered, path):
    response = entered.get(path)
    assert response.status_code in (404, 405)
    assert "import" not in response.text and "root:" not in response.text


@pytest.mark.parametrize("extra", [1, 10 * MAX_BODY])
def test_a_large_body_is_refused(entered, queue, extra):
    body = json.dumps({"tab": "1", "note": "x" * (MAX_BODY + extra)})
    headers = {"content-type": "application/json"}
    assert entered.post("/api/next", content=body, headers=headers).status_code == 413
    # Sent in pieces, without a length.
    pieces = (body[start : start + 1000].encode() for start in range(0, len(body), 1000))
    assert entered.post("/api/next", content=pieces, headers=headers).status_code == 413
    assert not queue.store.leases()


BODIES = [
    b"",
    b"[]",
    b"null",
    b"{",
    b"[" * 60000,
    b"\xff",
    b'{"tab": 1}',
    b'{"tab": ""}',
    b'{"tab": "%s"}' % (b"x" * 65),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda body: repr(body[:12]))
def test_a_malformed_request_is_refused(entered, body):
    response = entered.post("/api/next", content=body, headers={"content-type": "application/json"})
    assert response.status_code == 400 and response.json()["error"]


WRONG = [{"choice": "both"}, {"choice": None}, {"choice": ["left"]}, {"note": 3}, {"note": "x" * 10_001},
         {"seconds": "1"}, {"seconds": True}, {"seconds": None}, {"lease": 7}, {"lease": "é"}]  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG, ids=str)
def test_a_malformed_label_is_not_stored(entered, queue, wrong):
    lease = entered.post("/api/next", json={"tab": "1"}).json()["pair"]["lease"]
    fields = {"tab": "1", "lease": lease, "choice": "left"} | wrong
    assert entered.post("/api/label", json=fields).status_code == 400
    infinite = json.dumps({"tab": "1", "lease": lease, "choice": "left", "seconds": float("inf")})
    headers = {"content-type": "application/json"}
    assert entered.post("/api/label", content=infinite, headers=headers).status_code == 400
    assert not queue.votes()


def test_labelling_and_undo_by_requests(entered, queue):
    pair = entered.post("/api/next", json={"tab": "1"}).json()["pair"]
    fields = {"tab": "1", "lease": pair["lease"], "choice": "left", "note": "\ud800", "seconds": 1.5}
    content = json.dumps(fields)
    answer = entered.post("/api/label", content=content, headers={"content-type": "application/json"}).json()
    (vote,) = queue.votes()
    assert vote.label == float(pair["left"][0]["text"] == "a0") and vote.note == "\ud800" and vote.seconds == 1.5
    # What the reward model expected is told after the label only.
    assert answer["agreed"] == (vote.label == 1.0)
    assert answer["counts"]["given"] == 1 and answer["pair"]["lease"] != pair["lease"]
    assert answer["undo"] == pair["lease"]
    again = entered.post("/api/undo", json={"tab": "1", "lease": answer["undo"]}).json()
    assert again["pair"]["left"] == pair["left"] and not queue.votes()
    refused = entered.post("/api/undo", json={"tab": "2", "lease": "none"})
    assert refused.status_code == 409 and "no such label" in refused.json()["error"]


def test_every_answer_forbids_scripts_and_frames_of_others(client):
    for response in (client.get(f"/?token={TOKEN}"), client.get("/none"), client.get("/", headers={"host": "x"})):
        policy = response.headers["content-security-policy"]
        for part in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"):
            assert part in policy
        assert "unsafe" not in policy and "http" not in policy
        assert response.headers["x-frame-options"] == "DENY"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["referrer-policy"] == "no-referrer"


def test_the_page_asks_no_other_address_and_parses_no_html():
    from jaxrlhf.labelling.server import STATIC

    for name, _ in FILES.values():
        text = (STATIC / name).read_text()
        addresses = text.replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in addresses and "https:" not in addresses and "//" not in addresses.replace("// ", "")
        for sink in (
            "innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "srcdoc", "style=", "onclick="
        ):  # fmt: skip
            assert sink not in text, f"{name}: {sink}"


def test_a_page_runs_and_is_found_again_after_a_restart(tmp_path):
    path = tmp_path / "labels.sqlite"
    page = Page(Queue(LabelStore(path)), Board("Title"), port=0)
    address = page.start()
    token = path.with_name("labels.sqlite.token")
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    with pytest.raises(ValueError, match="Another process serves the labels"):
        Page(Queue(LabelStore(path)), Board("Title"), port=0)
    client = httpx.Client()
    assert client.get(address).status_code == 200
    port = int(address.split(":")[2].split("/")[0])
    page.stop()
    with pytest.raises(httpx.ConnectError):
        client.get(address)
    with Page(Queue(LabelStore(path)), Board("Title"), port=port) as again:
        assert again.address == address
        # The cookie of the first server opens the second.
        assert client.get(address.split("?")[0]).status_code == 200
        with pytest.raises(ValueError, match=f"port {port} .*in use.*give another --host or --port"):
            Page(Queue(LabelStore(tmp_path / "other.sqlite")), Board("Title"), port=port).start()
