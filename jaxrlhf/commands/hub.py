"""Models by their names on a hub: `org/name` or `org/name@revision`, through the cache of `huggingface_hub`."""

import dataclasses
import json
import pathlib
import re
import sys
from typing import Any, NamedTuple

import huggingface_hub
from huggingface_hub import errors

from jaxrlhf.commands.flags import flag
from jaxrlhf.training.processes import broadcast_text, is_first_process

FILES = (
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
NAME = re.compile(r"(?P<repository>\w[\w.-]*/\w[\w.-]*)(@(?P<revision>\w[\w./-]*))?", re.ASCII)
COMMIT = re.compile(r"[0-9a-f]{40}")


class HubName(NamedTuple):
    """A repository, and its branch, tag or commit; None is the hub's default branch."""

    repository: str
    revision: str | None

    def __str__(self) -> str:
        return self.repository + (f"@{self.revision}" if self.revision else "")


def hub_name(path: str | pathlib.Path) -> HubName | None:
    """Returns the name that a path is; None where it has another form, or it or its parent is on this machine."""
    match = NAME.fullmatch(str(path))
    if match is None or pathlib.Path(path).parent.exists():
        return None
    return HubName(match["repository"], match["revision"])


def local_directory(path: pathlib.Path) -> pathlib.Path:
    """Returns the directory of a model: the path itself, or the hub's files of that name, downloaded where they are not.

    Several processes that share a cache download each file once. The directory's name is the commit.

    Raises:
        ValueError: the hub has no such model, refuses it, or cannot be reached.
    """
    name = hub_name(path)
    if name is None:
        return path
    try:
        found = huggingface_hub.snapshot_download(name.repository, revision=name.revision, allow_patterns=list(FILES))
    except (errors.HFValidationError, errors.HTTPError, OSError, ValueError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise ValueError(_reason(name, error)) from None
    return pathlib.Path(str(found))


def pinned(config: Any) -> Any:
    """Returns a command's settings with the commit of every model that is named on a hub, and prints each once.

    All processes take the commit that the first one found. A resumed run takes the commit of its own configuration where
    no revision is given.

    Raises:
        ValueError: as `local_directory`.
    """
    changes = {}
    for field in MODELS:
        value = getattr(config, field, None)
        name = None if value is None else hub_name(value)
        if name is None or COMMIT.fullmatch(name.revision or ""):
            continue
        name = _of_run(config, field, name)
        commit = broadcast_text(lambda name=name: local_directory(pathlib.Path(str(name))).name)
        kind: Any = type(value)
        changes[field] = kind(str(HubName(name.repository, commit)))
        if is_first_process():
            print(f"{flag(field)} {value} is read at commit {commit}.", file=sys.stderr)
    return dataclasses.replace(config, **changes) if changes else config


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
    return HubName(name.repository, match["revision"])


def _reason(name: HubName, error: Exception) -> str:
    """Returns one sentence on why a model could not be had."""
    seen, cause = set(), error
    while not isinstance(cause, errors.HfHubHTTPError) and cause.__cause__ is not None and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__
    status = cause.response.status_code if isinstance(cause, errors.HfHubHTTPError) else None
    if isinstance(cause, errors.RevisionNotFoundError):
        return (
            f"{name.repository} on the hub has no revision {name.revision}; name one of its branches, tags or commits."
        )
    absent = f"There is no directory {name}; give one, or the name of a model on the hub"
    if status in (401, 403):
        return f"{absent}, which answered {status}: check the name, or set HF_TOKEN to a token that may read it."
    if status == 404:
        return f"{absent}, which has no {name.repository}."
    if status is not None:
        return f"{absent}, which answered {status}: try again later."
    return (
        f"{absent}, which was not reached or broke off ({type(error).__name__}): check connection and HF_HUB_OFFLINE."
    )
