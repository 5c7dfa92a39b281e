"""Models and data sets by their names on a hub, `org/name` or `org/name@revision`, through `huggingface_hub`'s cache."""

import contextlib
import dataclasses
import json
import pathlib
import re
import sys
from typing import Any, Literal, NamedTuple

import huggingface_hub
from huggingface_hub import errors

from jaxrlhf.commands.flags import flag
from jaxrlhf.data.files import CSV, JSONL, PARQUET, PLAIN
from jaxrlhf.training.processes import broadcast_text, is_first_process

FILES = (
    "README.md",
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "additional_chat_templates/*.jinja",
)
"""What is read of a model's repository; nothing else is downloaded."""
MODELS = ("policy", "reference", "reward", "tokenizer", "annotator", "source")
"""Settings of commands that name a model."""
DATA = ("data", "from_preferences")
"""Settings of commands that name a data set."""
ENDINGS = (*JSONL, *CSV, *PARQUET, *PLAIN)
NAME = re.compile(
    r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?(:(?P<part>(?!.*\.\.)[^:/][^:]*))?", re.ASCII
)
FAILURES = (errors.HTTPError, OSError, ValueError)  # pyright: ignore[reportPrivateImportUsage]
COMMIT = re.compile(r"[0-9a-f]{40}")
SNAPSHOT = re.compile(r"models--(?P<owner>[\w.-]+?)--(?P<name>[\w.-]+)/snapshots/(?P<commit>[0-9a-f]{40})$", re.ASCII)
SHARD = re.compile(r"-\d{5}-of-\d{5}(?=\.)")
Kind = Literal["model", "dataset"]
WANTED: dict[Kind, tuple[str, str]] = {"model": ("directory", "a model"), "dataset": ("file or folder", "a data set")}


class HubName(NamedTuple):
    """A repository, its branch, tag or commit (None is the hub's default branch), and of a data set the part to read.

    A part is a file, a folder, or a pattern with `*` for files of a folder.
    """

    repository: str
    revision: str | None
    part: str | None = None

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return self.repository + revision + (f":{self.part}" if self.part else "")


def hub_name(path: str | pathlib.Path, kind: Kind = "model") -> HubName | None:
    """Returns the name that a path is; None where it has another form, or it or its parent is on this machine."""
    match = NAME.fullmatch(str(path))
    if match is None or pathlib.Path(path).exists() or pathlib.Path(match["repository"]).parent.exists():
        return None
    # A file that is not there is no data set.
    if match["part"] if kind == "model" else not match["part"] and str(path).lower().endswith(ENDINGS):
        return None
    return HubName(**match.groupdict())


def local_directory(path: pathlib.Path) -> pathlib.Path:
    """Returns the directory of a model: the path itself, or the hub's files of that name, downloaded where they are not.

    Several processes that share a cache download each file once. The directory's name is the commit.

    Raises:
        ValueError: the hub has no such model, refuses it, or cannot be reached.
    """
    name = hub_name(path)
    return path if name is None else _snapshot(name, "model", list(FILES))


def cached_name(directory: pathlib.Path) -> HubName | None:
    """Returns the name and commit of a model directory that is a snapshot in the hub's cache."""
    match = SNAPSHOT.search(str(directory))
    return None if match is None else HubName(f"{match['owner']}/{match['name']}", match["commit"])


def local_data(path: str) -> pathlib.Path:
    """Returns the file or folder of a data set, downloaded as by `local_directory`, or what `data_files` takes for it.

    Raises:
        ValueError: as `local_directory`; or the repository holds several data sets or splits, and the name says not which.
    """
    name = hub_name(path, "dataset")
    if name is None:
        return pathlib.Path(path)
    return _downloaded(name) / (name.part or "")


def pinned(config: Any) -> Any:
    """Returns a command's settings with the commit of every model and data set on a hub, and prints each once.

    All processes take the commit that the first one found. A resumed run takes the commit of its own configuration where
    no revision is given.

    Raises:
        ValueError: as `local_directory` and `local_data`.
    """
    changes = {}
    for field in (*MODELS, *DATA):
        value = getattr(config, field, None)
        if value is not None:
            several = isinstance(value, tuple)
            found = tuple(_pinned(config, field, each) for each in (value if several else (value,)))
            changes[field] = found if several else found[0]
    changes = {field: value for field, value in changes.items() if value != getattr(config, field)}
    return dataclasses.replace(config, **changes) if changes else config


def _pinned(config: Any, field: str, value: Any) -> Any:
    kind: Kind = "dataset" if field in DATA else "model"
    name = hub_name(value, kind)
    if name is None or COMMIT.fullmatch(name.revision or ""):
        return value
    name = _of_run(config, field, name)
    commit = broadcast_text(lambda: (_downloaded(name) if field in DATA else _snapshot(name, kind, list(FILES))).name)
    if is_first_process():
        print(f"{flag(field)} {value} is read at commit {commit}.", file=sys.stderr)
    kind_of: Any = type(value)
    return kind_of(str(name._replace(revision=commit)))


def _snapshot(name: HubName, kind: Kind, patterns: list[str]) -> pathlib.Path:
    try:
        found = huggingface_hub.snapshot_download(
            name.repository, repo_type=kind, revision=name.revision, allow_patterns=patterns
        )
    except FAILURES as error:
        raise ValueError(_reason(name, kind, error)) from None
    return pathlib.Path(str(found))


def _downloaded(name: HubName) -> pathlib.Path:
    """Returns the snapshot that holds the part of a data set that a name means."""
    if name.part is None:
        patterns = [f"*{ending}" for ending in ENDINGS]
        # Refused before anything is downloaded; where the hub cannot be reached, by what is in the cache.
        listed: list[str] = []
        if not _is_cached(name, patterns):
            with contextlib.suppress(*FAILURES):
                found = huggingface_hub.dataset_info(name.repository, revision=name.revision)
                listed = [file.rfilename for file in found.siblings or []]
        if listed:
            _check_one(name, listed)
        folder = _snapshot(name, "dataset", patterns)
        _check_one(name, [str(file.relative_to(folder)) for file in folder.rglob("*") if not file.is_dir()])
        return folder
    folder = _snapshot(name, "dataset", [name.part, *(f"{name.part}/*{ending}" for ending in ENDINGS)])
    if not any(folder.glob(name.part)):
        raise ValueError(f"{name.repository} on the hub has no {name.part}; name one of its files or folders.")
    return folder


def _is_cached(name: HubName, patterns: list[str]) -> bool:
    """Returns whether all files of a commit are in the cache, so that the hub need not be asked."""
    if not COMMIT.fullmatch(name.revision or ""):
        return False
    try:
        options: dict[str, Any] = {"repo_type": "dataset", "allow_patterns": patterns, "local_files_only": True}
        huggingface_hub.snapshot_download(name.repository, revision=name.revision, **options)
    except FAILURES:
        return False
    return True


def _check_one(name: HubName, files: list[str]) -> None:
    """Refuses a repository whose files are not one data set in one or several shards."""
    groups = sorted({SHARD.sub("-*", file) for file in files if file.lower().endswith(ENDINGS)})
    groups = [group for group in groups if not group.lower().endswith(PLAIN)] or groups
    if not groups:
        raise ValueError(f"{name.repository} on the hub holds no file that ends in {', '.join(ENDINGS)}.")
    if len(groups) > 1:
        listed = ", ".join([*groups[:6], *(["..."] if len(groups) > 6 else [])])
        raise ValueError(
            f"{name.repository} on the hub holds {listed}; say which to read, such as '{name._replace(part=groups[0])}'."
        )


def _of_run(config: Any, field: str, name: HubName) -> HubName:
    """Returns the name with the commit that the run to resume was started with."""
    if name.revision is not None or not getattr(config, "resume", False) or not getattr(config, "run", None):
        return name
    try:
        settings = json.loads((config.output / config.run / "config.json").read_text(encoding="utf-8"))
        match = NAME.fullmatch(settings[field])
    except (OSError, ValueError, KeyError, TypeError):
        return name
    if match is None or match["repository"] != name.repository:
        return name
    return name._replace(revision=match["revision"])


def _reason(name: HubName, kind: Kind, error: Exception) -> str:
    """Returns one sentence on why a model or a data set could not be had."""
    seen, cause = set(), error
    while not isinstance(cause, errors.HfHubHTTPError) and cause.__cause__ is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f"{name.repository} on the hub has no revision {name.revision}; name one of its branches, tags or commits."
        )
    place, thing = WANTED[kind]
    absent = f"There is no {place} {name}; give one, or the name of {thing} on the hub"
    if status in (401, 403):
        return f"{absent}, which answered {status}: check the name, or set HF_TOKEN to a token that may read it."
    if status == 404:
        return f"{absent}, which has no {name.repository}."
    if status is not None:
        return f"{absent}, which answered {status}: try again later."
    return (
        f"{absent}, which was not reached or broke off ({type(error).__name__}): check connection and HF_HUB_OFFLINE."
    )
