"""Models by name, from a small server on this machine that speaks what `huggingface_hub` asks of the hub."""

import contextlib
import dataclasses
import hashlib
import http.server
import json
import pathlib
import re
import threading

import huggingface_hub.constants
import huggingface_hub.hf_api
import pytest

from jaxrlhf.commands import export, hub
from jaxrlhf.commands.main import run

OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """Serves one repository, `org/tiny`; `fault` is a status to answer, or `cut` to break off the weights."""

    def __init__(self, directory):
        self.files = {path.name: path.read_bytes() for path in directory.iterdir()} | {"other.bin": b"unread"}
        self.revisions = {"main": OLD, OLD: OLD, NEW: NEW}
        self.fault, self.sent = None, []

    def answer(self, request, body):
        path = request.path.split("?")[0]
        if isinstance(self.fault, int):
            return self.error(request, self.fault, "")
        found = re.fullmatch(r"/(?:api/models/)?org/tiny/(revision|tree|resolve)/([^/]+)/?(.*)", path)
        if found is None:
            # A repository that is not there, without a token: as the real hub answers.
            code = "RepoNotFound" if path.startswith(("/api/models", "/org/absent")) else ""
            return self.error(request, 404, code)
        kind, revision, name = found.groups()
        commit = self.revisions.get(revision)
        if commit is None:
            return self.error(request, 404, "RevisionNotFound")
        siblings = [{"rfilename": each} for each in self.files]
        tree = [
            {"type": "file", "path": each, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for each, content in self.files.items()
        ]
        if kind != "resolve":
            value = tree if kind == "tree" else {"id": "org/tiny", "sha": commit, "siblings": siblings}
            return self.send(request, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)
        content = self.files[name]
        self.sent += [name] if body else []
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self.send(request, content, headers, body, cut=self.fault == "cut" and name == "model.safetensors")

    def send(self, request, content, headers, body, cut=False):
        start = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        offset = int(start[1]) if start else 0
        request.send_response(206 if start else 200)
        if start:
            request.send_header("Content-Range", f"bytes {offset}-{len(content) - 1}/{len(content)}")
        for key, value in {"Content-Length": str(len(content) - offset), **headers}.items():
            request.send_header(key, value)
        request.end_headers()
        if body:
            request.wfile.write(content[offset : len(content) // 2 if cut else None])
            request.close_connection = cut or request.close_connection

    def error(self, request, status, code):
        request.send_response(status)
        request.send_header("Content-Length", "0")
        if code:
            request.send_header("X-Error-Code", code)
        request.end_headers()


@pytest.fixture
def served(here, tmp_path, monkeypatch):
    """The server, with an empty cache of the hub and a clock that does not wait between tries."""
    hub_server = Hub(here / "base")

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            hub_server.answer(self, True)

        def do_HEAD(self):
            hub_server.answer(self, False)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address, cache = f"http://127.0.0.1:{server.server_port}", tmp_path / "cache"
    for module, name, value in (
        (huggingface_hub.constants, "ENDPOINT", address),
        (
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            address + "/{repo_id}/resolve/{revision}/{filename}",
        ),
        (huggingface_hub.hf_api.api, "endpoint", address),
        (huggingface_hub.constants, "HF_HUB_CACHE", str(cache)),
    ):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr("time.sleep", lambda _: None)
    hub_server.cache, hub_server.stop = cache, server.shutdown
    yield hub_server
    with contextlib.suppress(OSError):
        server.shutdown()
        server.server_close()


def exported(name, to):
    return run(export.Export(source=pathlib.Path(name), to=to))


def test_a_model_is_read_by_name_and_only_the_needed_files(served, tmp_path, capsys):
    exported("org/tiny", tmp_path / "out")
    assert f"--source org/tiny is read at commit {OLD}." in capsys.readouterr().err
    assert "other.bin" not in served.sent and served.sent.count("model.safetensors") == 1
    served.fault, served.sent = 500, []
    exported(f"org/tiny@{OLD}", tmp_path / "again")
    assert served.sent == []
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "again")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("name", "fault", "said"),
    [
        ("org/tiny", 401, "HF_TOKEN"),
        ("org/tiny", 403, "HF_TOKEN"),
        ("org/tiny", 500, "answered 500"),
        ("org/absent", None, "which has no org/absent."),
        ("org/tiny@absent", None, "has no revision absent"),
        ("org/tiny", "cut", "broke off"),
    ],
)
def test_failures_are_one_sentence_and_the_next_try_works(served, tmp_path, capsys, name, fault, said):
    served.fault = fault
    with pytest.raises(SystemExit) as stopped:
        exported(name, tmp_path / "out")
    message = capsys.readouterr().err
    assert stopped.value.code == 2 and said in message, message
    assert not (tmp_path / "out").exists()
    served.fault = None
    exported("org/tiny", tmp_path / "out")


@dataclasses.dataclass(frozen=True)
class Resumed:
    policy: pathlib.Path
    output: pathlib.Path
    run: str = "r"
    resume: bool = True


@pytest.mark.parametrize(
    ("given", "recorded", "read"),
    [
        ("org/tiny", f"org/tiny@{OLD}", OLD),
        ("org/tiny@main", f"org/tiny@{OLD}", NEW),
        ("org/tiny", f"org/other@{OLD}", NEW),
        ("org/tiny", None, NEW),
    ],
)
def test_a_resumed_run_keeps_its_commit_where_no_revision_is_given(served, tmp_path, given, recorded, read):
    served.revisions["main"] = NEW
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(json.dumps({"policy": recorded}))
    assert str(hub.pinned(Resumed(pathlib.Path(given), tmp_path)).policy) == f"org/tiny@{read}"


def test_a_directory_on_this_machine_wins(served, tmp_path, monkeypatch):
    assert hub.local_directory(pathlib.Path("org/tiny")).name == OLD
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert hub.local_directory(pathlib.Path("org/tiny")) == pathlib.Path("org/tiny")
