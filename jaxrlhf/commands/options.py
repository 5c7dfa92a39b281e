"""The options of a command, read from its dataclass: types, help, defaults, and the groups that `--help` shows them in."""

import ast
import dataclasses
import functools
import inspect
import pathlib
import textwrap
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, Union

import tyro
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

Groups = Mapping[str, tuple[str, ...]]
"""Type of a dataclass's `GROUPS`: the titles under which `--help` shows its options, with their names in order."""
MAIN = "main settings"
"""Title of the group that comes first."""
OTHER = "other settings"
"""Title of the group of options that no `GROUPS` names."""
OWN = {
    "help": ("-h, --help", "Shows this help."),
    "config": (
        "--config FILE",
        "Reads settings from a YAML or JSON file, such as a run's config.json; options win.",
    ),
    "print_config": ("--print-config", "Prints all settings as YAML, to be read by --config, and does nothing else."),
}
"""Options that every command has beside its settings: how they are written, and their help."""


class Option(NamedTuple):
    """A setting of a command.

    Attributes:
        name: of the dataclass's field.
        kind: its type, without annotations.
        help: its docstring.
        default: None, or `dataclasses.MISSING` where the option is required.
        repeatable: whether each use of the option adds a value.
        positional: whether it is written without its name.
    """

    name: str
    kind: Any
    help: str
    default: Any
    repeatable: bool
    positional: bool

    @property
    def required(self) -> bool:
        """Whether the option must be given."""
        return self.default is dataclasses.MISSING


@functools.cache
def options_of(kind: type) -> dict[str, Option]:
    """Returns the options of a command by name, in the order of its fields."""
    hints, texts, options = typing.get_type_hints(kind, include_extras=True), _docstrings(kind), {}
    for field in dataclasses.fields(kind):
        annotated = hints[field.name]
        bare = typing.get_args(annotated)[0] if typing.get_origin(annotated) is typing.Annotated else annotated
        repeatable = annotated == tyro.conf.UseAppendAction[bare]
        positional = tyro.conf.Positional in typing.get_args(annotated)[1:]
        text = texts.get(field.name, "")
        options[field.name] = Option(field.name, bare, text, field.default, repeatable, positional)
    return options


def groups_of(kind: type) -> dict[str, list[Option]]:
    """Returns the options of a command by the title of their group, the main settings first.

    An option belongs to the group that names it in the `GROUPS` of the most derived class. Without any `GROUPS` all are
    main settings.
    """
    left, titles = dict(options_of(kind)), {MAIN: []}
    for each in inspect.getmro(kind):
        for title, names in vars(each).get("GROUPS", {}).items():
            titles.setdefault(title, []).extend(left.pop(name) for name in names if name in left)
    titles.setdefault(OTHER if any(titles.values()) else MAIN, []).extend(left.values())
    return {title: options for title, options in titles.items() if options}


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types that a value may have: those of a union, or the type itself."""
    return typing.get_args(kind) if typing.get_origin(kind) in (Union, types.UnionType) else (kind,)


def print_help(kind: type, name: str) -> None:
    """Prints what a command does and its options in groups."""
    console = Console(highlight=False)
    console.print(f"usage: jaxrlhf {name} [OPTIONS]\n", markup=False)
    for paragraph in inspect.cleandoc(kind.__doc__ or "").split("\n\n"):
        console.print(" ".join(paragraph.split()) + "\n", markup=False)
    rows = {"options of every command": [(written, text) for written, text in OWN.values()]}
    groups = {title: [help_row(option) for option in options] for title, options in groups_of(kind).items()}
    for title, pairs in (groups | rows).items():
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(width=26, overflow="fold")
        table.add_column()
        for written, text in pairs:
            table.add_row(Text(written), Text(text))
        console.print(Panel(table, title=title, title_align="left", border_style="dim"))


def help_row(option: Option) -> tuple[str, str]:
    """Returns how an option is written, and its help with its default."""
    flag = f"--{option.name.replace('_', '-')}"
    written = f"{flag}, --no-{flag[2:]}" if option.kind is bool else f"{flag} {_metavar(option.kind)}"
    if option.positional:
        written = option.name.upper()
    if option.required:
        return written, f"{option.help} (required)"
    if option.repeatable:
        return written, f"{option.help} (repeatable)"
    if option.default in (None, ()) or (option.kind is bool and not option.default):
        return written, option.help
    default = "on" if option.default is True else option.default
    return written, f"{option.help} (default: {default})" if default != "" else option.help


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is tuple:
        return f"{_metavar(typing.get_args(kind)[0])} ..."
    if typing.get_origin(kind) is Literal:
        return "{" + ", ".join(map(str, typing.get_args(kind))) + "}"
    names = {str: "TEXT", pathlib.Path: "PATH", int: "INT", float: "FLOAT"}
    return "|".join(names.get(each) or _metavar(each) for each in alternatives(kind) if each is not types.NoneType)


def _docstrings(kind: type) -> dict[str, str]:
    """Returns the docstrings below the fields of a dataclass and its bases, each as one paragraph."""
    found = {}
    for each in reversed(inspect.getmro(kind)):
        if not dataclasses.is_dataclass(each):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(tree, ast.ClassDef)
        for field, below in zip(tree.body, tree.body[1:], strict=False):
            match field, below:
                case ast.AnnAssign(target=ast.Name(name)), ast.Expr(ast.Constant(str(text))):
                    found[name] = " ".join(text.split())
    return found
