"""Settings from a file and from the command line, the same for every command: `--config` and `--print-config`."""

import contextlib
import dataclasses
import difflib
import json
import math
import pathlib
import re
import reprlib
import sys
import textwrap
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

import tyro
import yaml

import jaxrlhf
from jaxrlhf.commands.options import Option, alternatives, groups_of, options_of, print_help
from jaxrlhf.training.run_folder import plain

NOT_SETTINGS = ("command", "version")
"""Keys of a file that say what wrote it."""
NOTHING = "None"
"""A value that is none, in a file as on the command line; null is the default."""
NOT_GIVEN = "\0"
"""Stands for an option that must be given and is not; printed as null."""
FLOAT = r"[-+]?(\.[0-9]+|(0|[1-9][0-9]*)(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)"
QUOTED = rf"{FLOAT}|true|false"
"""What is a number or a flag, unless it stands in quotes."""
EXPECTED = {bool: "true or false", int: "a whole number", float: "a number", str: "text", pathlib.Path: "a path"}


def parse(kind: type, arguments: Sequence[str], name: str) -> Any:
    """Returns the configuration of a command from its arguments, and from the file that `--config` names.

    With `--help` or `--print-config` it prints and exits.

    Args:
        kind: the command's dataclass.
        arguments: of the command line, without the command.
        name: of the command.

    Raises:
        ValueError: the file cannot be read, or is not one of settings of this command; the message names file and key.
        SystemExit: the arguments cannot be understood.
    """
    own, rest = _split(arguments)
    if "help" in own:
        print_help(kind, name)
        raise SystemExit(0)
    settings = read_settings(pathlib.Path(own["config"]), kind, name) if "config" in own else {}
    options = options_of(kind)
    # An option that can be repeated replaces the file's values rather than adding to them.
    added = {each: settings.pop(each) for each in list(settings) if options[each].repeatable}
    # What is printed without them is a file to start from.
    printing = "print_config" in own
    missing = {
        each: option.kind(NOT_GIVEN) if printing else tyro.MISSING
        for each, option in options.items()
        if option.required
    }
    config = tyro.cli(kind, args=rest, prog=f"jaxrlhf {name}", default=kind(**missing | settings))
    unset = {each: value for each, value in added.items() if getattr(config, each) == options[each].default}
    config = dataclasses.replace(config, **unset)
    if printing:
        print(config_text(config, name, letters=sys.stdout.encoding or "utf-8"), end="")
        raise SystemExit(0)
    return config


def config_values(config: Any, name: str) -> dict[str, Any]:
    """Returns what `config.json` holds of a command's configuration, to be read again by `--config`."""
    options = options_of(type(config))
    values = {each: _written(option, getattr(config, each)) for each, option in options.items()}
    return {"command": name, "version": jaxrlhf.__version__} | values


def config_text(config: Any, name: str, *, letters: str = "utf-8") -> str:
    """Returns a configuration as YAML, in groups, with the help of each option above it.

    Args:
        config: the configuration.
        name: of the command.
        letters: an encoding; values that have letters which it lacks are escaped.
    """
    values = {key: None if value == NOT_GIVEN else value for key, value in config_values(config, name).items()}
    lines = [_yaml_line(key, values[key], letters) for key in NOT_SETTINGS]
    for title, options in groups_of(type(config)).items():
        lines += ["", f"# {title[0].upper()}{title[1:]}", ""]
        for option in options:
            lines += textwrap.wrap(
                option.help, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
            )
            lines.append(_yaml_line(option.name, values[option.name], letters))
    return "\n".join(lines) + "\n"


def read_settings(path: pathlib.Path, kind: type, name: str) -> dict[str, Any]:
    """Returns the settings in a file; those that are null are left out, and so have their default.

    Args:
        path: of the file, or the folder of a run with its `config.json`.
        kind: the command's dataclass; where its `READS_OTHERS` is set, it takes its settings from any command's file.
        name: of the command.

    Raises:
        ValueError: the file cannot be read, is of another command, or has a key or value that the command does not take.
    """
    path = path / "config.json" if path.is_dir() else path
    values = _load(path)
    command, version = (values.pop(key, None) for key in NOT_SETTINGS)
    options, settings = options_of(kind), {}
    if command not in (None, name):
        if not getattr(kind, "READS_OTHERS", False):
            raise ValueError(f"{path} has the settings of jaxrlhf {command}, not of jaxrlhf {name}.")
        values = {key: value for key, value in values.items() if key.replace("-", "_") in options}
    unknown = [key for key in values if key.replace("-", "_") not in options]
    if unknown:
        raise ValueError(_unknown_message(path, name, unknown, list(options), version))
    given = set()
    for key, value in values.items():
        setting = key.replace("-", "_")
        if setting in given:
            raise ValueError(f"{path} gives {setting} twice.")
        option = options[setting]
        if value is not None:
            settings[setting] = _typed(option.kind, value, f"{setting} in {path}")
        given.add(setting)
    return settings


def _split(arguments: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Returns the options of every command that are given, and the other arguments."""
    own, rest, stream = {}, [], iter(arguments)
    for argument in stream:
        option, given, value = argument.partition("=")
        option = option.replace("_", "-")
        if argument in ("-h", "--help"):
            own["help"] = ""
        elif argument == "--print-config":
            own["print_config"] = ""
        elif option == "--config":
            if "config" in own:
                raise ValueError("--config is given twice; give one file.")
            own["config"] = value if given else next(stream, "")
            if not own["config"]:
                raise ValueError("--config needs the name of a file.")
        else:
            rest.append(argument)
    return own, rest


def _unknown_message(path: pathlib.Path, name: str, unknown: list[str], known: list[str], version: Any) -> str:
    texts = []
    for key in unknown[:3]:
        near = difflib.get_close_matches(key.replace("-", "_"), known, 1)
        texts.append(f"{_shown(key)} (the nearest is {near[0]})" if near else _shown(key))
    texts += [f"{len(unknown) - 3} more"] if len(unknown) > 3 else []
    text = f"{path} gives {', '.join(texts)}, which jaxrlhf {name} does not have (its settings: jaxrlhf {name} --help)"
    if version not in (None, jaxrlhf.__version__):
        text += f"; jaxrlhf {version} wrote it, and this is {jaxrlhf.__version__}"
    return f"{text}."


def _typed(kind: Any, value: Any, place: str) -> Any:
    """Returns a value of a file as the type of its option; None for `NOTHING`, where the option may be none.

    Raises:
        ValueError: it has another type.
    """
    kinds = alternatives(kind)
    if types.NoneType in kinds and value == NOTHING:
        return None
    for each in kinds:
        if (each is bool and isinstance(value, bool)) or (each is str and isinstance(value, str)):
            return value
        if each is pathlib.Path and isinstance(value, str):
            return pathlib.Path(value)
        if each in (int, float) and isinstance(value, (int, each)) and not isinstance(value, bool):
            with contextlib.suppress(OverflowError):
                return each(value)
        if typing.get_origin(each) is Literal and value in typing.get_args(each) and isinstance(value, str):
            return value
        if typing.get_origin(each) is tuple:
            # One value may stand alone.
            parts, member = value if isinstance(value, list) else [value], typing.get_args(each)[0]
            return tuple(_typed(member, part, f"value {number} of {place}") for number, part in enumerate(parts, 1))
    expected = " or ".join(_expected(each) for each in kinds if each is not types.NoneType)
    hint = "; put it in quotes" if str in kinds and not isinstance(value, (list, dict, types.NoneType)) else ""
    if isinstance(value, str) and re.fullmatch(f"(?:{QUOTED})", value):
        hint = " as text; leave out its quotes"
    raise ValueError(f"{place} must be {expected}, got {_shown(value)}{hint}.")


def _expected(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    return EXPECTED[kind]


def _shown(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    return value if isinstance(value, str) and re.fullmatch(r"[\w.-]{1,40}", value) else reprlib.repr(value)


def _written(option: Option, value: Any) -> Any:
    """Returns a value as files have it: null would be the default, and a number that is not finite stays one."""
    if isinstance(value, float):
        return value
    return NOTHING if value is None and option.default is not None else plain(value)


def _load(path: pathlib.Path) -> dict[str, Any]:
    """Returns the mapping in a JSON or YAML file, whose keys are all text."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"There is no file {path}, which --config names.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read ({error}); --config takes YAML or JSON in UTF-8.") from None
    try:
        if path.suffix == ".json":
            values = json.loads(text, object_pairs_hook=_without_duplicates)
        else:
            values = yaml.load(text, _Loader)
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        raise ValueError(f"{path} is not {kind} that can be read: {' '.join(str(error).split())[:300]}.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold settings by name, such as steps: 100; it holds {_shown(values)}.")
    return {str(key): value for key, value in values.items()}


def _without_duplicates(pairs: Sequence[tuple[Any, Any]]) -> dict[Any, Any]:
    found = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {_shown(key)} is given twice")
        found[key] = value
    return found


class _Loader(yaml.SafeLoader):
    """Reads YAML 1.2's scalars, as 1.1 takes 1e-4 for text, `no` for false and 12:30 for 750; refuses duplicate keys."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        pairs = [
            (self.construct_object(key, deep=True), self.construct_object(value, deep=deep))
            for key, value in node.value
        ]
        try:
            return _without_duplicates(pairs)
        except (TypeError, ValueError) as error:
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from None


class _Dumper(yaml.SafeDumper):
    """Writes text in quotes where `_Loader` would read it as something else."""

    yaml_implicit_resolvers: typing.ClassVar[dict] = {}


for _kind, _pattern, _first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ("~", "n", "N", "")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", FLOAT, "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern})$"), list(_first))


def _yaml_line(key: str, value: Any, letters: str) -> str:
    # A line end of Unicode's that is not escaped is read as a space.
    text = str(value)
    as_it_is = "\x85" not in text and text.encode(letters, "replace").decode(letters) == text
    line = yaml.dump({key: value}, Dumper=_Dumper, default_flow_style=True, allow_unicode=as_it_is, width=math.inf)
    return line.strip()[1:-1]
