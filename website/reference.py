"""The pages of the reference: every public name of a room, first those that the room itself exports."""

import ast
import inspect
import pathlib
import re

ROOMS = (
    "base", "bilevel", "preferences", "evaluation", "algorithms", "exact", "mdp", "control", "data", "lm", "annotation",
    "labelling", "known", "training",
)  # fmt: skip


def exports(package: pathlib.Path) -> list[str]:
    """The names in `__all__` of a package, without its subpackages."""
    for node in ast.parse((package / "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__":
            return ast.literal_eval(node.value)
    return []


def defined(module: pathlib.Path) -> list[str]:
    """The public functions and classes that a module defines."""
    found = (node for node in ast.parse(module.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return [node.name for node in found if not node.name.startswith("_")]


def home(root: pathlib.Path, package: pathlib.Path, name: str) -> str:
    """The dotted name at which an exported name is documented.

    That is the package's own, but for a name that a module on the way to it has too, which would be shown in its place.
    """
    place, shadowed = package, False
    while True:
        for node in ast.parse((place / "__init__.py").read_text()).body:
            if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names):
                origin = root.parent.joinpath(*(node.module or "").split("."))
                break
        else:
            return f"{name_of(root, package)}.{name}"
        shadowed = shadowed or origin.name == name
        if not origin.is_dir():
            return f"{name_of(root, origin if shadowed else package)}.{name}"
        place = origin


def modules(root: pathlib.Path, room: str) -> list[pathlib.Path]:
    """The modules of a room in the order of its page: its own, then those of its subpackages."""
    found = (path for path in (root / room).rglob("*.py") if path.stem != "__init__")
    return sorted(found, key=lambda path: (len(path.parts), path))


def name_of(root: pathlib.Path, path: pathlib.Path) -> str:
    """The dotted name of a module or package."""
    return ".".join((root.name, *path.relative_to(root).with_suffix("").parts))


def public_names(root: pathlib.Path) -> dict[str, str]:
    """Every public name, by the address at which its page documents it: `{"jaxrlhf.bilevel.central": "bilevel", ...}`."""
    found: dict[str, str] = {}
    for room in ROOMS:
        exported = exports(root / room)
        found |= {home(root, root / room, name): room for name in exported}
        for module in modules(root, room):
            names = [name for name in defined(module) if name not in exported]
            found |= {f"{name_of(root, module)}.{name}": room for name in names}
    return found


def page(root: pathlib.Path, room: str) -> str:
    """The page of a room."""
    prefix = f"{root.name}.{room}"
    lines = [f"# {prefix}", "", _entry(prefix, 2, members=False, heading=False)]
    exported = exports(root / room)
    if exported:
        lines += [f"## Names of {prefix}", ""]
        lines += [_entry(home(root, root / room, name), 3) for name in sorted(exported, key=str.lower)]
    for module in modules(root, room):
        names = [name for name in defined(module) if name not in exported]
        if names:
            dotted = name_of(root, module)
            lines += [f"## {dotted}", "", _entry(dotted, 2, members=False, heading=False)]
            lines += [_entry(f"{dotted}.{name}", 3) for name in names]
    return "\n".join(lines) + "\n"


def commands_page() -> str:
    """The page of the command line: every option of every command, in the groups of `--help`."""
    # The library is needed for this page alone, and JAX need not look for an accelerator.
    from jaxrlhf.commands import main, options

    lines = ["# The command line", "", "Options may also come [from a file](../configuration.md).", ""]
    for name, (kind, _) in main.COMMANDS.items():
        lines += [f"## jaxrlhf {name}", "", inspect.cleandoc(kind.__doc__ or ""), ""]
        for title, group in options.groups_of(kind).items():
            lines += [f"### {title} {{: #{name}-{title.replace(' ', '-').replace(',', '')} }}", ""]
            for option in group:
                written, text = options.help_row(option)
                lines += [f"`{written}`", "", f":   {_prose(text)}", ""]
    written = [f"`{flag}`\n\n:   {_prose(text)}\n" for flag, text in options.OWN.values()]
    return "\n".join([*lines, "## Options of every command", "", *written])


def _prose(text: str) -> str:
    """Help as Markdown: its letters as they are."""
    return re.sub(r"([\[\]<>*_\\])", r"\\\1", text)


def _entry(name: str, level: int, *, members: bool = True, heading: bool = True) -> str:
    options = {"heading_level": level, "show_root_heading": heading, "show_root_toc_entry": heading}
    lines = [f"::: {name}", "    options:", *(f"      {key}: {str(value).lower()}" for key, value in options.items())]
    return "\n".join(lines + ([] if members else ["      members: false"])) + "\n"
