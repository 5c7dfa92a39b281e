"""What a program does, read from it: products in its jaxpr, communication in its compiled text."""

import collections
import math
import re
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def flops_of(jaxpr: Any, *, turns: int = 1) -> float:
    """Returns the floating point operations of a program's products, all of its devices together.

    What compilers count takes the body of a loop once; here a scan counts as often as it runs, with whatever is computed
    again in a backward pass.

    Args:
        jaxpr: of `jax.make_jaxpr`.
        turns: of loops whose number of turns is not known before they run, together with those of loops inside of them.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2.0 * inner * math.prod(equation.outvars[0].aval.shape)
            continue
        inside = [flops_of(each, turns=1 if name == "while" else turns) for each in _programs_in(params)]
        times = params["length"] if name == "scan" else turns if name == "while" else 1
        total += times * (max(inside, default=0.0) if name == "cond" else sum(inside))
    return total


def _programs_in(params: dict[str, Any]) -> list[Any]:
    found = []
    for value in params.values():
        for each in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(each, "eqns") or hasattr(getattr(each, "jaxpr", None), "eqns"):
                found.append(each)
    return found


def collectives_of(text: str, *, turns: int = 1) -> dict[str, float]:
    """Returns the bytes that come out of each kind of collective on one device, loops counted as often as they run.

    Args:
        text: of a compiled program (`compiled.as_text()`).
        turns: of loops whose number of turns the compiler does not know.
    """
    programs, entry = _computations(text)
    found: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, times: float) -> None:
        for line in programs.get(name, ()):
            for kind in COLLECTIVES:
                if re.search(rf" {kind}(-start)?\(", line):
                    found[kind] += times * _largest(line.split(f" {kind}", 1)[0])
            loop = " while(" in line
            inner = times * (_turns(line, programs) or turns) if loop else times
            called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [each.strip().lstrip("%") for each in group.split(",")]
            for each in called:
                visit(each, inner)

    visit(entry, 1.0)
    return dict(found)


def _turns(loop: str, programs: dict[str, list[str]]) -> int | None:
    """Returns how often a loop runs, where its line says so or its condition is a count below a constant."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = programs.get(condition[1], ()) if condition else ()
    constants = dict(re.findall(r"(%[\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)", "\n".join(lines)))
    bounds = [re.search(r"ROOT .* compare\([^,]+, (%[\w.\-]+)\), direction=LT", line) for line in lines]
    return next((int(constants[bound[1]]) for bound in bounds if bound and bound[1] in constants), None)


def largest_collective(text: str) -> float:
    """Returns the bytes of the largest array that any collective makes."""
    programs, _ = _computations(text)
    sizes = [
        _largest(line.split(f" {kind}", 1)[0])
        for lines in programs.values()
        for line in lines
        for kind in COLLECTIVES
        if re.search(rf" {kind}(-start)?\(", line)
    ]
    return max(sizes, default=0.0)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by name, and the name of the one that is entered."""
    programs: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head[2]
            programs[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            programs[name].append(line)
    return programs, entry


def _largest(result: str) -> float:
    """Returns the bytes of the largest array among those that a line defines."""
    sizes = [0.0]
    for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result):
        if kind in _BYTES:
            sizes.append(_BYTES[kind] * math.prod(int(size) for size in shape.split(",") if size))
    return max(sizes)
