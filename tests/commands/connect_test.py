"""`jaxrlhf label --connect` with a stand-in for ssh, which forwards the port and runs the command as SSH would."""

import os
import pathlib
import signal
import socket
import sys
import threading
import time

import httpx
import pytest

pytest.importorskip("starlette", reason="the labelling page needs the extra labelling")
pytest.importorskip("uvicorn", reason="the labelling page needs the extra labelling")

from jaxrlhf.commands import label
from jaxrlhf.labelling import Board, LabelStore, Page, Queue, make_pair

SSH = """#!{python}
import os, pathlib, socket, subprocess, sys, threading
pathlib.Path("asked.txt").write_text("\\n".join(sys.argv[1:]))
_, here, _, there = sys.argv[sys.argv.index("-L") + 1].split(":")
host, remote = sys.argv[sys.argv.index("--") + 1 :]
if host == "nowhere":
    sys.exit("ssh: Could not resolve hostname nowhere")
listener = socket.create_server(("127.0.0.1", int(here)))
def copy(one, other):
    while data := one.recv(65536):
        other.sendall(data)
    other.shutdown(socket.SHUT_WR)
def serve():
    while True:
        near, far = listener.accept()[0], socket.create_connection(("127.0.0.1", int(there)))
        for pair in ((near, far), (far, near)):
            threading.Thread(target=copy, args=pair, daemon=True).start()
threading.Thread(target=serve, daemon=True).start()
sys.exit(subprocess.run(["sh", "-c", remote], cwd=os.environ["FAR_HOME"]).returncode)
"""


@pytest.fixture
def far(tmp_path, monkeypatch):
    """The home of another machine, on which a page is served from the run `runs/it's`; and its page."""
    home, near = tmp_path / "far", tmp_path / "near"
    (home / "runs" / "it's").mkdir(parents=True)
    (near / "bin").mkdir(parents=True)
    ssh = near / "bin" / "ssh"
    ssh.write_text(SSH.format(python=sys.executable))
    ssh.chmod(0o755)
    monkeypatch.chdir(near)
    monkeypatch.setenv("PATH", f"{near / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAR_HOME", str(home))
    queue = Queue(LabelStore(home / "runs" / "it's" / "people.sqlite"), repeats=0.0)
    queue.add([make_pair("people", "Which?", "one", "two")])
    with Page(queue, Board("Far away"), port=0) as page:
        yield page


def port_of(page):
    return int(page.address.split(":")[2].split("/")[0])


def test_a_page_elsewhere_is_opened_here(far, capsys):
    seen = []

    def look():
        deadline = time.monotonic() + 30
        address = ""
        while not address and time.monotonic() < deadline:
            time.sleep(0.05)
            printed = capsys.readouterr().out
            address = next((line for line in printed.splitlines() if line.startswith("http")), "")
        origin = address.split("/?")[0]
        with httpx.Client(base_url=origin, headers={"origin": origin}, timeout=10) as client:
            seen.append((address, client.get(address).status_code, client.post("/api/next", json={"tab": "t"}).json()))
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=look)
    thread.start()
    # The page's own port is taken here, by the page itself.
    assert label.main(label.Label(connect="pod:~/runs/it's", port=port_of(far))) is None
    thread.join(10)
    ((address, status, answer),) = seen
    assert status == 200 and answer["pair"]["prompt"][0]["text"] == "Which?" and answer["board"]["title"] == "Far away"
    assert address.split("token=")[1] == far.address.split("token=")[1]
    asked = pathlib.Path("asked.txt").read_text().splitlines()
    assert asked[:2] == ["-o", "ExitOnForwardFailure=yes"] and asked[4:6] == ["--", "pod"]
    with socket.socket() as probe:  # nothing is left listening
        assert probe.connect_ex(("127.0.0.1", int(address.split(":")[2].split("/")[0]))) != 0


@pytest.mark.parametrize(
    ("place", "more", "message"),
    [
        ("pod:runs/none", {}, r"not reached \(no page is or was served from there\)"),
        ("nowhere:runs", {}, r"not reached \(ssh: Could not resolve hostname nowhere\)"),
        ("-oProxyCommand=touch x:runs", {}, "--connect takes HOST:FOLDER"),
        ("runs", {}, "--connect takes HOST:FOLDER"),
        ("pod:runs", {"data": "x.jsonl"}, "--data does not apply with --connect"),
        ("pod:runs", {"port": 0}, "--connect needs the --port"),
    ],
)
def test_what_cannot_be_reached_is_said(far, place, more, message):
    with pytest.raises(ValueError, match=message):
        label.main(label.Label(connect=place, **{"port": port_of(far)} | more))


def test_without_ssh_it_is_said(far, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="--connect needs the program ssh"):
        label.main(label.Label(connect="pod:runs", port=port_of(far)))


def test_without_connect_both_files_are_needed():
    with pytest.raises(ValueError, match="Give --data and --to"):
        label.main(label.Label(data="pairs.jsonl"))
