"""Models and data sets by name, from a small server on this machine that speaks what `huggingface_hub` asks of the hub."""

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
import jax
import pytest

from jaxrlhf.commands import export, hub
from jaxrlhf.commands.data import read_all
from jaxrlhf.commands.main import run
from jaxrlhf.commands.models import open_model, save_trained_adapter
from jaxrlhf.data import DataError
from jaxrlhf.lm import lora
from jaxrlhf.lm.hugging_face.adapters import open_adapter

OLD, NEW = "a" * 40, "b" * 40


class Hub:
    """Serves the model `org/tiny` and the data set `org/pairs`; `fault` is a status to answer, or `cut` to break off."""

    def __init__(self, directory):
        model = {path.name: path.read_bytes() for path in directory.iterdir()} | {"other.bin": b"unread"}
        self.repositories = {"org/tiny": model, "org/pairs": {}}
        self.revisions = {"main": OLD, OLD: OLD, NEW: NEW}
        self.fault, self.sent = None, []

    def answer(self, request, body):
        path = request.path.split("?")[0]
        if isinstance(self.fault, int):
            return self.error(request, self.fault, "")
        found = re.fullmatch(
            r"/(?:api/models/|api/datasets/|datasets/)?(org/tiny|org/pairs)/(revision|tree|resolve)/([^/]+)/?(.*)", path
        )
        if found is None or ("datasets" in path) != (found[1] == "org/pairs"):
            # A repository that is not there, without a token: as the real hub answers.
            code = "RepoNotFound" if path.startswith(("/api/models", "/api/datasets", "/org/absent")) else ""
            return self.error(request, 404, code)
        repository, kind, revision, name = found.groups()
        files = self.repositories[repository]
        commit = self.revisions.get(revision)
        if commit is None:
            return self.error(request, 404, "RevisionNotFound")
        siblings = [{"rfilename": each} for each in files]
        tree = [
            {"type": "file", "path": each, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for each, content in files.items()
        ]
        if kind != "resolve":
            value = tree if kind == "tree" else {"id": repository, "sha": commit, "siblings": siblings}
            return self.send(request, json.dumps(value).encode(), {"Content-Type": "application/json"}, body)
        content = files[name]
        self.sent += [name] if body else []
        headers = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit}
        return self.send(request, content, headers, body, cut=self.fault == "cut" and len(content) > 999)

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
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
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


def test_an_adapter_names_its_base_on_the_hub_and_is_read_at_that_commit(served, tmp_path):
    start = open_model("org/tiny", "policy")
    adapter = lora.init_adapter(jax.random.key(0), start.params, rank=1)
    save_trained_adapter(tmp_path, start, adapter, "policy")
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["base_model_name_or_path"], settings["revision"]) == ("org/tiny", OLD)
    served.revisions["main"] = NEW
    assert open_adapter(tmp_path / "adapter", hub.local_directory).base == start.bundle.directory
    assert hub.cached_name(tmp_path / "models--org--tiny" / "snapshots" / "main") is None


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


def shards(*names, rows=2):
    """Returns the contents of files of prompts, which are the files' names with a number."""
    return {
        name: "".join(json.dumps({"prompt": f"{name} {row}", "pad": "x" * 999}) + "\n" for row in range(rows)).encode()
        for name in names
    } | {"README.md": b"# Pairs", ".gitattributes": b"", "image.png": b"unread"}


def prompts(name, tmp_path):
    config = hub.pinned(Data(name))
    found = read_all(config.data, form="auto", skip_bad=False, data_dir=tmp_path)
    return config.data, [record.prompt.split()[0] for record in found.records]


@dataclasses.dataclass(frozen=True)
class Data:
    data: str


@pytest.mark.parametrize(
    ("files", "part", "read"),
    [
        (["train.jsonl"], "", ["train.jsonl"]),
        (["notes.txt", "train.jsonl"], "", ["train.jsonl"]),
        (["data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.jsonl"], "", "all"),
        (["data/train-00000-of-00001.jsonl", "data/test.jsonl"], ":data/train-*", ["data/train-00000-of-00001.jsonl"]),
        (["train.jsonl", "test.jsonl"], ":test.jsonl", ["test.jsonl"]),
        (["b/train.jsonl", "b/test.jsonl", "a.csv"], ":b", ["b/test.jsonl", "b/train.jsonl"]),
        (["b/train.jsonl", "a.csv"], ":b/", ["b/train.jsonl"]),
        (["a.jsonl.gz", "b.jsonl"], ":*.jsonl", ["b.jsonl"]),
        (["lines.json", "b.jsonl"], ":lines.json", ["lines.json"]),
    ],
)  # fmt: skip
def test_a_data_set_is_read_by_name_and_only_what_is_asked_for(served, tmp_path, capsys, files, part, read):
    served.repositories["org/pairs"] = shards(*files)
    read = files if read == "all" else read
    pinned, found = prompts("org/pairs" + part, tmp_path)
    assert (
        pinned == f"org/pairs@{OLD}{part}"
        and f"--data org/pairs{part} is read at commit {OLD}." in capsys.readouterr().err
    )
    assert found == [each for each in read for _ in range(2)]
    assert set(served.sent) == set(read) | ({"notes.txt"} & set(files))
    # Again, from the cache alone.
    served.fault = 500
    assert prompts(pinned, tmp_path) == (pinned, found) and prompts("org/pairs" + part, tmp_path) == (pinned, found)


@pytest.mark.parametrize(
    ("files", "name", "fault", "said"),
    [
        (["train.jsonl"], "org/pairs", 401, "HF_TOKEN"),
        (["train.jsonl"], "org/pairs", 500, "name of a data set on the hub, which answered 500"),
        (["train.jsonl"], "org/pairs", "cut", "broke off"),
        (["train.jsonl"], "org/absent", None, "There is no file or folder org/absent; .* which has no org/absent"),
        (["train.jsonl"], "org/tiny", None, "has no org/tiny"),
        (["train.jsonl"], "org/pairs@absent", None, "has no revision absent"),
        (["train.jsonl"], "org/pairs:test.jsonl", None, "has no test.jsonl; name one of its files or folders"),
        ([], "org/pairs", None, "holds no file that ends in"),
        (
            [
                "data/train-00000-of-00002.parquet",
                "data/train-00001-of-00002.parquet",
                "data/test-00000-of-00001.parquet",
            ],
            "org/pairs@main",
            None,
            r"holds data/test-\*.parquet, data/train-\*.parquet; say which .* 'org/pairs@main:data/test-\*.parquet'",
        ),
    ],
)
def test_data_that_the_hub_does_not_give_are_one_sentence(served, tmp_path, files, name, fault, said):
    served.repositories["org/pairs"], served.fault = shards(*files), fault
    with pytest.raises(ValueError, match=said):
        prompts(name, tmp_path)
    if fault is None:
        assert served.sent == []
    else:
        served.fault = None
        assert prompts(name, tmp_path)[1] == [each for each in files for _ in range(2)]


def test_an_incomplete_download_is_not_taken_for_the_data(served, tmp_path):
    served.repositories["org/pairs"] = shards("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl")
    prompts("org/pairs:train-00000-of-00002.jsonl", tmp_path)
    served.fault = 500
    with pytest.raises(ValueError, match="which answered 500"):
        prompts("org/pairs", tmp_path)


def test_data_of_this_machine_win_and_a_missing_file_asks_no_hub(served, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"There is no file or folder org/pairs\.jsonl"):
        prompts("org/pairs.jsonl", tmp_path)
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "pairs").write_text('{"prompt": "here"}\n')
    assert prompts("org/pairs", tmp_path) == ("org/pairs", ["here"])
    assert served.sent == []


@dataclasses.dataclass(frozen=True)
class ResumedData(Resumed):
    data: str = "org/pairs:train.jsonl"


def test_a_resumed_run_reads_its_data_at_their_commit(served, tmp_path):
    served.repositories["org/pairs"], served.revisions["main"] = shards("train.jsonl"), NEW
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "config.json").write_text(json.dumps({"data": f"org/pairs@{OLD}:train.jsonl"}))
    assert hub.pinned(ResumedData(pathlib.Path("base"), tmp_path)).data == f"org/pairs@{OLD}:train.jsonl"


@dataclasses.dataclass(frozen=True)
class Several:
    policy: tuple[pathlib.Path, ...]
    from_preferences: str


def test_each_of_several_policies_and_known_preferences_are_read_at_their_commits(served):
    served.repositories["org/pairs"] = shards("train.jsonl")
    config = hub.pinned(Several((pathlib.Path("org/tiny"), pathlib.Path("base")), "org/pairs"))
    assert config.policy == (pathlib.Path(f"org/tiny@{OLD}"), pathlib.Path("base"))
    assert config.from_preferences == f"org/pairs@{OLD}"
