"""Model cards: the `README.md` of each saved model, with the hub's metadata and without paths of this machine."""

import contextlib
import hashlib
import os
import pathlib
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import yaml

import jaxrlhf
from jaxrlhf.commands.flags import flag
from jaxrlhf.commands.hub import COMMIT, hub_name, local_directory
from jaxrlhf.commands.method_flags import READS, beta_of, learns_scale
from jaxrlhf.commands.options import options_of
from jaxrlhf.lm.hugging_face.families import Kind
from jaxrlhf.training.report import Table, as_markdown

COMMANDS = {"Supervised": "sft", "Reward": "reward", "Direct": "dpo", "Align": "align"}
"""The commands that make models, by the names of their configurations."""
LEFT_OUT = ("output", "run", "resume", "data_dir", "track", "processes", "checkpoint_minutes", "checkpoint_steps")
"""Settings that say where and when, and not what."""
CARD, OTHER_CARD = "README.md", "README.jaxrlhf.md"
MARK = re.compile(r"\n<!-- Written by jaxrlhf \S+, ([0-9a-f]{64})\. An edited card is kept\. -->\n$")
EXPORT = "\n## Export\n"
LOADS = {
    "policy": ("AutoModelForCausalLM", "text-generation", 'jaxrlhf sample --policy DIR --prompt "Once upon a time"'),
    "reward": (
        "AutoModelForSequenceClassification",
        "text-classification",
        "jaxrlhf evaluate --reward DIR --data PAIRS",
    ),
}
"""Of a kind of model: the class of transformers, the hub's pipeline, and a command that uses it."""
ADDRESS = re.compile(r"(https?://)[^\s,;()#]+")
ABSOLUTE = re.compile(r"(?<![\w./:])(?:/[^\s/,;:()'\"]+)+/([^\s/,;:()'\"]+)")


class Told(NamedTuple):
    """What a run's report says, for the cards of its models.

    Attributes:
        title, summary: of the report.
        tables: of the report.
        notes: one sentence each.
    """

    title: str
    summary: str
    tables: Sequence[Table]
    notes: Sequence[str]


class Base(NamedTuple):
    """What a model was made from: its name without a path, and the metadata that hold for the new model too."""

    name: str
    metadata: dict[str, Any]


def write_cards(folder: pathlib.Path, config: Any, told: Told) -> None:
    """Writes the card of every model and adapter in the folder of a run of `sft`, `reward`, `dpo` or `align`.

    A card that was edited, or that this library did not write, is kept, and the new one stands beside it.
    """
    for place in ("", "best"):
        for kind in ("policy", "reward"):
            directory = folder / place / kind
            if (directory / "config.json").is_file():
                best = place == "best"
                _write(directory, _trained_card(folder.name, config, told, kind, best=best, adapter=False))
                if (directory / "adapter" / "adapter_config.json").is_file():
                    text = _trained_card(folder.name, config, told, kind, best=best, adapter=True)
                    _write(directory / "adapter", text)


def write_exported_card(
    directory: pathlib.Path, source: pathlib.Path, given: pathlib.Path, kind: Kind, dtype: str
) -> None:
    """Writes the card of an exported model: the source's, if this library wrote one, and what was exported.

    Args:
        directory: of the exported model.
        source: the directory that it was read from.
        given: the source as the user named it.
        kind: of the model.
        dtype: of the exported tensors.
    """
    # The card of an adapter's merged model is the one that describes what is exported.
    described = source.parent if source.name == "adapter" else source
    text = _read(described / CARD)
    if is_own(text):
        body = text[: MARK.search(text).start()].partition(EXPORT)[0]  # pyright: ignore[reportOptionalMemberAccess]
    else:
        base = _base(given)
        body = _front_matter(kind, base, ["jaxrlhf"], adapter=False) + "\n".join(
            [
                f"# {directory.resolve().name}",
                "",
                f"A {kind} model: the weights of {base.name}.",
                *_use(kind),
                *_versions(),
            ]
        )
    _write(directory, f"{body}{EXPORT}\nWritten by `jaxrlhf export --kind {kind} --dtype {dtype}`.\n")


def is_own(text: str) -> bool:
    """Returns whether a card is as this library wrote it."""
    mark = MARK.search(text)
    return mark is not None and hashlib.sha256(text[: mark.start()].encode()).hexdigest() == mark[1]


def command_line(config: Any) -> str:
    """Returns the command of a configuration, without what says where and when, and with names in place of paths."""
    words = ["jaxrlhf", COMMANDS[type(config).__name__]]
    for option in options_of(type(config)).values():
        value = getattr(config, option.name)
        if option.name in LEFT_OUT or (value == option.default and not option.required):
            continue
        name = flag(option.name)
        if isinstance(value, bool):
            words.append(name if value else f"--no-{name[2:]}")
        elif isinstance(value, tuple):
            values = [_shown(each) for each in value]
            words += [word for each in values for word in (name, each)] if option.repeatable else [name, *values]
        else:
            words += [name, _shown(value)]
    return shlex.join(words)


def _trained_card(name: str, config: Any, told: Told, kind: Kind, *, best: bool, adapter: bool) -> str:
    reward = getattr(config, "reward", None) if kind == "reward" else None
    base = _base(reward or config.policy)
    given = [each for each in (config.data, getattr(config, "from_preferences", None)) if each is not None]
    method = getattr(config, "method", None) or getattr(config, "loss", None) or COMMANDS[type(config).__name__]
    data = [_repository(each) for each in given]
    known = base.metadata.get("datasets") or []
    datasets = sorted({*filter(None, data), *([known] if isinstance(known, str) else known)})
    base = base._replace(metadata=base.metadata | {"datasets": datasets or None})
    what = "adapter" if adapter else "model"
    lines = [
        f"# {name}",
        "",
        f"A {kind} {what}, made from {base.name} with the data {' and '.join(map(_shown, given))} by `jaxrlhf "
        f"{COMMANDS[type(config).__name__]}`.",
        "",
        "## Method",
        "",
        f"{told.title}.",
        "",
        *(f"- {title}: {value}" for title, value in _settings(config).items()),
        "",
        f"    {command_line(config)}",
        "",
        "## Results",
        "",
        *(["These are the weights of the best evaluated step; the figures are of the last one.", ""] if best else []),
        # Where the models are is no news in their own folder, nor true of an export.
        _clean(re.sub(r"The models? (is|are) in [^.]*\.", "", told.summary).strip(), config),
        "",
        *(_clean(as_markdown(table), config) for table in told.tables),
        *(f"- {_clean(' '.join(note.split()), config)}" for note in told.notes if not note.startswith("Skipped ")),
        *_use(kind, base=base.name if adapter else None),
        *_versions(),
    ]
    named = [] if method == "sft" else ["rlhf"]
    named += ["reward-model"] if kind == "reward" else []
    named += [] if method == "reward" else [method]
    tags = ["jaxrlhf", *named, *(["lora"] if config.lora_rank else [])]
    return _front_matter(kind, base, tags, adapter=adapter) + "\n".join(lines)


def _settings(config: Any) -> dict[str, Any]:
    """Returns the settings that name the objective."""
    rows = {"method": getattr(config, "method", None), "loss": getattr(config, "loss", None)}
    if hasattr(config, "kl_price"):
        rows["kappa, the price of a nat of KL in win rate"] = config.kl_price
        if "beta" in READS[config.method]:
            moved = config.target_kl is not None or learns_scale(config)
            rows[f"beta, the weight of the KL{' at the start' if moved else ''}"] = beta_of(config)
        rows["target KL in nats"] = config.target_kl
    rows["beta"] = getattr(config, "kl_weight", None)
    rows["rank of the adapters"] = config.lora_rank or None
    rows["seed"] = config.seed
    return {title: value for title, value in rows.items() if value is not None}


def _front_matter(kind: Kind, base: Base, tags: list[str], *, adapter: bool) -> str:
    # It is loaded where a model is written only.
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        **base.metadata, library_name="peft" if adapter else "transformers", pipeline_tag=LOADS[kind][1], tags=tags
    )
    return f"---\n{data.to_yaml()}\n---\n\n"


def _base(path: pathlib.Path | None) -> Base:
    """Returns what a model was made from, with the licence, data and hub's name that its own card has."""
    if path is None:
        return Base("random weights", {})
    name, found = _shown(path), _card_metadata(path)
    on_hub = hub_name(path)
    own = found.pop("own")
    metadata = {key: value for key, value in found.items() if key.startswith("license")}
    if not str(metadata.get("license_link", "https:")).startswith("https:"):
        metadata.pop("license_link")
    if on_hub is not None:
        metadata["base_model"] = on_hub.repository
        commit = on_hub.revision or ""
        name = f"{on_hub.repository} at commit {commit}" if COMMIT.fullmatch(commit) else name
    elif own:
        # Metadata can name the last model that has a name on the hub.
        metadata |= {key: found[key] for key in ("base_model", "datasets") if key in found}
    elif re.fullmatch(r"\w[\w.-]*", name, re.ASCII):
        metadata["base_model"] = name
    return Base(name, metadata)


def _card_metadata(path: pathlib.Path) -> dict[str, Any]:
    """Returns the metadata of a model's card, and whether this library wrote it; without a card none."""
    from huggingface_hub.repocard import metadata_load

    # The card is no reason for a run to fail at its end.
    with contextlib.suppress(ValueError, OSError, yaml.YAMLError):
        # From Python a path may be a text.
        directory = local_directory(pathlib.Path(path))
        for each in (directory, directory / "policy", directory / "reward"):
            if (each / CARD).is_file():
                return (metadata_load(each / CARD) or {}) | {"own": is_own(_read(each / CARD))}
    return {"own": False}


def _repository(data: str) -> str | None:
    name = hub_name(data, "dataset")
    return "Anthropic/hh-rlhf" if data.startswith("hh-rlhf:") else name and name.repository


def _use(kind: Kind, *, base: str | None = None) -> list[str]:
    loader, _, command = LOADS[kind]
    first = f"from transformers import {loader}, AutoTokenizer"
    model = f'model = {loader}.from_pretrained("DIR")'
    if base is not None:
        first = f"from peft import AutoPeft{loader.removeprefix('Auto')}\nfrom transformers import AutoTokenizer"
        size = ", num_labels=1" if kind == "reward" else ""
        model = f'model = AutoPeft{loader.removeprefix("Auto")}.from_pretrained("DIR"{size})'
    end = 'tokenizer = AutoTokenizer.from_pretrained("DIR")'
    end = end if base is None else end.replace("DIR", "BASE")
    where = "DIR is this directory, or its name on the hub" + (f"; BASE is {base}." if base is not None else ".")
    return ["", "## Use", "", where, "", "```python", first, "", model, end, "```", "", f"    {command}", ""]


def _versions() -> list[str]:
    return [
        "## Versions",
        "",
        f"jaxrlhf {jaxrlhf.__version__}, JAX {jax.__version__}, Python {platform.python_version()}",
        "",
    ]


def _shown(value: Any) -> str:
    """Returns a setting as cards show it: of a path of this machine the last part, of an address its model alone."""
    text = str(value)
    if "://" in text:
        return ADDRESS.sub(r"\1...", text)
    named = hub_name(text) or hub_name(text, "dataset") or text.startswith("hh-rlhf:")
    if named or not ("/" in text or isinstance(value, pathlib.PurePath)):
        return text
    return pathlib.PurePath(text).name or pathlib.Path(text).resolve().name


def _clean(text: str, config: Any) -> str:
    """Returns a text of the report without paths and addresses, as Markdown."""
    values = [value for option in options_of(type(config)) for value in _each(getattr(config, option))]
    for value in sorted(values, key=lambda value: -len(str(value))):
        text = text.replace(str(value), _shown(value))
    text = ABSOLUTE.sub(r"\1", ADDRESS.sub(r"\1...", text))
    return text.replace("<", "&lt;")


def _each(value: Any) -> list[Any]:
    """Returns the paths and the texts with a slash in a setting."""
    values = value if isinstance(value, tuple) else (value,)
    return [each for each in values if isinstance(each, str | pathlib.PurePath) and "/" in str(each)]


def _read(path: pathlib.Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _write(directory: pathlib.Path, text: str) -> None:
    path, present = directory / CARD, _read(directory / CARD)
    if present and not is_own(present):
        path = directory / OTHER_CARD
        print(
            f"{directory / CARD} was not written by jaxrlhf, or was edited, and is kept; see {path.name}.",
            file=sys.stderr,
        )
    # A model's text may contain half a surrogate pair.
    text = text.encode("utf-8", errors="replace").decode()
    mark = hashlib.sha256(text.encode()).hexdigest()
    text += f"\n<!-- Written by jaxrlhf {jaxrlhf.__version__}, {mark}. An edited card is kept. -->\n"
    partial = directory / f".{path.name}.{os.getpid()}"
    try:
        partial.write_bytes(text.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
