"""Lists the public names with their signatures, as `public_api.txt` has them: `python tests/api/listing.py [--write]`.

Public is what a room's `__all__` names; in a room without one, what its modules define without an underscore; and what the
documentation, examples and notebooks import from elsewhere. Read from the source: nothing is imported.
"""

import ast
import json
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "jaxrlhf"
FILE = pathlib.Path(__file__).with_name("public_api.txt")
HIDDEN = ("commands",)
"""Its interface is the command line, whose options other tests hold."""
HEADER = """\
# The public names of jaxrlhf with their signatures, room by room. Made by: python tests/api/listing.py --write
"""


def listing() -> dict[str, str]:
    """Returns the signature of each public name: that of a class has a line for each field and method."""
    found = {}
    for room in [PACKAGE, *sorted(path.parent for path in PACKAGE.glob("*/__init__.py"))]:
        name = ".".join(room.relative_to(ROOT).parts)
        if room.name in HIDDEN:
            continue
        names = exported(room / "__init__.py")
        if names is not None:
            found |= {f"{name}.{each}": signature(name, each) for each in names}
            continue
        for path in sorted(room.glob("*.py")):
            for each in defined(path):
                found[f"{name}.{path.stem}.{each}"] = signature(f"{name}.{path.stem}", each)
    for module, name in sorted(shown()):
        if module.split(".")[1] not in HIDDEN and f"{module}.{name}" not in found:
            found[f"{module}.{name}"] = signature(module, name)
    return found


def text(names: dict[str, str]) -> str:
    """Returns the contents of the file."""
    return HEADER + "".join(f"\n{name}{shape}\n" for name, shape in names.items())


def read(content: str) -> dict[str, str]:
    """Returns the names and signatures in the contents of the file."""
    entries = content.removeprefix(HEADER).strip("\n").split("\n\n")
    return {found[0]: entry[found.end() :] for entry in entries if (found := re.match(r"[\w.]+", entry))}


def exported(path: pathlib.Path) -> list[str] | None:
    """Returns the names in a module's `__all__`, or None without one."""
    for node in tree_of(path).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    return None


def defined(path: pathlib.Path) -> list[str]:
    """Returns the public names that a module defines."""
    names = []
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            names += [target.id] if isinstance(target, ast.Name) else []
    return sorted({name for name in names if not name.startswith("_")})


def shown() -> set[tuple[str, str]]:
    """Returns the modules and names that documentation, examples and notebooks import."""
    sources = [
        path.read_text() for folder in ("docs", "examples") for path in sorted((ROOT / folder).rglob("*.[mp][dy]"))
    ]
    sources.append((ROOT / "README.md").read_text())
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        sources += ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]]
    pairs = set()
    for module, names in re.findall(
        r"^\s*from (jaxrlhf(?:\.\w+)+) import (\([^)]*\)|[^\n]*)", "\n".join(sources), re.MULTILINE
    ):
        for name in re.findall(r"(?<!as )\b[A-Za-z_]\w*\b(?! as \w+ as)", re.sub(r" as \w+|#.*", "", names)):
            if place_of(module, name) is not None:
                pairs.add((module, name))
    return pairs


def place_of(module: str, name: str) -> ast.stmt | None:
    """Returns the definition of a module's name, wherever it is imported from; None if it is a module or is not there."""
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    if not path.is_file():
        return None
    for node in tree_of(path).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == name:
            return node
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if name in map(ast.unparse, targets):
                return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name and (node.module, alias.name) != (module, name):
                    return place_of(str(node.module), alias.name)
    return None


def signature(module: str, name: str) -> str:
    """Returns what follows a name in the file."""
    node = place_of(module, name)
    if node is None:
        return ": module"
    if isinstance(node, ast.FunctionDef):
        return arguments(node)
    if isinstance(node, ast.ClassDef):
        return "".join([f"({', '.join(map(ast.unparse, node.bases))})", *(f"\n    {line}" for line in members(node))])
    if isinstance(node, ast.AnnAssign):
        return f": {ast.unparse(node.annotation)}"
    return ": constant"


def arguments(node: ast.FunctionDef) -> str:
    """Returns the arguments and the result of a function."""
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"({ast.unparse(node.args)}){returns}"


def members(node: ast.ClassDef) -> list[str]:
    """Returns the fields, properties and methods of a class."""
    lines = []
    for each in node.body:
        if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_"):
            lines.append(ast.unparse(each))
        elif isinstance(each, ast.FunctionDef) and (not each.name.startswith("_") or each.name == "__init__"):
            is_property = any(ast.unparse(decorator) == "property" for decorator in each.decorator_list)
            lines.append(f"{each.name}: property" if is_property else each.name + arguments(each))
    return lines


_trees: dict[pathlib.Path, ast.Module] = {}


def tree_of(path: pathlib.Path) -> ast.Module:
    """Returns the parsed source of a file."""
    if path not in _trees:
        _trees[path] = ast.parse(path.read_text())
    return _trees[path]


if __name__ == "__main__":
    content = text(listing())
    if "--write" in sys.argv:
        FILE.write_text(content)
    else:
        print(content, end="")
