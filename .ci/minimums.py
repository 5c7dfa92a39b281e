"""Compares the minimums in pyproject.toml with what the lowest resolution, a file of `name==version`, comes to."""

import pathlib
import re
import sys
import tomllib


def numbers(version: str) -> list[int]:
    """Returns the parts of a version without trailing zeros."""
    parts = [int(part) for part in re.findall(r"\d+", version)]
    while parts and parts[-1] == 0:
        parts.pop()
    return parts


def missed(project: dict, resolved: str) -> list[str]:
    """Returns a sentence for each minimum of the dependencies and of `test` that is below what was resolved."""
    found = {name.lower(): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", resolved, re.MULTILINE)}
    sentences = []
    for entry in (*project["dependencies"], *project["optional-dependencies"]["test"]):
        match = re.fullmatch(r"([\w.-]+)(?:\[\w+\])?>=([\d.]+)", entry)
        if match is None:
            sentences.append(f"{entry} names no minimum, such as {entry}>=1.0.")
        elif match[1].lower() not in found:
            sentences.append(f"{match[1]} was not resolved.")
        elif numbers(match[2]) != numbers(found[match[1].lower()]):
            sentences.append(f"{entry} cannot be had with the others; the lowest is {found[match[1].lower()]}.")
    return sentences


if __name__ == "__main__":
    root = pathlib.Path(__file__).resolve().parents[1]
    lines = missed(
        tomllib.loads((root / "pyproject.toml").read_text())["project"], pathlib.Path(sys.argv[1]).read_text()
    )
    print("\n".join(lines), end="\n" if lines else "")
    sys.exit(1 if lines else 0)
