"""Reads a program's costs from it: matrix products from its jaxpr, communication from its compiled text."""

import collections
import math
import re
from typing import Any

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}


def flops_of(jaxpr: Any, *, trip_count: int = 1) -> float:
    """Returns the FLOPs of a program's matrix products, summed over its devices.

    Compilers count the body of a loop once. Here the body of a scan counts once per iteration, and recomputation in the
    backward pass counts too.

    Args:
        jaxpr: from `jax.make_jaxpr`.
        trip_count: iterations of each while loop, those of any while loops inside it included.
    """
    total = 0.0
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (left, _), _ = params["dimension_numbers"]
            contracted = math.prod(equation.invars[0].aval.shape[axis] for axis in left)
            total += 2.0 * contracted * math.prod(equation.outvars[0].aval.shape)
            continue
        inner = [flops_of(each, trip_count=1 if name == "while" else trip_count) for each in _subprograms(params)]
        times = params["length"] if name == "scan" else trip_count if name == "while" else 1
        total += times * (max(inner, default=0.0) if name == "cond" else sum(inner))
    return total


def _subprograms(params: dict[str, Any]) -> list[Any]:
    values = [each for value in params.values() for each in (value if isinstance(value, (tuple, list)) else (value,))]
    return [each for each in values if hasattr(each, "eqns") or hasattr(getattr(each, "jaxpr", None), "eqns")]


def collectives_of(text: str, *, trip_count: int = 1) -> dict[str, float]:
    """Returns the output bytes of each kind of collective on one device, loop bodies counted once per iteration.

    Args:
        text: of a compiled program (`compiled.as_text()`).
        trip_count: of loops whose trip count the compiler does not know.
    """
    computations, entry = _computations(text)
    totals: dict[str, float] = collections.defaultdict(float)

    def visit(name: str, times: float) -> None:
        for line in computations.get(name, ()):
            for kind in COLLECTIVES:
                if re.search(rf" {kind}(-start)?\(", line):
                    totals[kind] += times * _largest(line.split(f" {kind}", 1)[0])
            loop = " while(" in line
            inner = times * (_trip_count(line, computations) or trip_count) if loop else times
            called = re.findall(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", line)
            for group in re.findall(r"branch_computations=\{([^}]*)\}", line):
                called += [each.strip().lstrip("%") for each in group.split(",")]
            for each in called:
                visit(each, inner)

    visit(entry, 1.0)
    return dict(totals)


def _trip_count(loop: str, computations: dict[str, list[str]]) -> int | None:
    """Returns the trip count of a loop if its line states it or its condition compares a counter with a constant."""
    if known := re.search(r"known_trip_count\W+n\W+(\d+)", loop):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop)
    lines = computations.get(condition[1], ()) if condition else ()
    constants = dict(re.findall(r"(%[\w.\-]+) = [su]\d+\[\]\S* constant\((\d+)\)", "\n".join(lines)))
    bounds = [re.search(r"ROOT .* compare\([^,]+, (%[\w.\-]+)\), direction=LT", line) for line in lines]
    return next((int(constants[bound[1]]) for bound in bounds if bound and bound[1] in constants), None)


def largest_collective(text: str) -> float:
    """Returns the bytes of the largest array that any collective outputs."""
    computations, _ = _computations(text)
    sizes = [
        _largest(line.split(f" {kind}", 1)[0])
        for lines in computations.values()
        for line in lines
        for kind in COLLECTIVES
        if re.search(rf" {kind}(-start)?\(", line)
    ]
    return max(sizes, default=0.0)


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    """Returns the lines of each computation by name, and the name of the entry computation."""
    computations: dict[str, list[str]] = {}
    entry = name = ""
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
        if head and not line.startswith(" "):
            name = head[2]
            computations[name] = []
            entry = name if head[1] else entry
        elif name and line.startswith(" "):
            computations[name].append(line)
    return computations, entry


def _largest(result: str) -> float:
    """Returns the bytes of the largest array that a line defines."""
    sizes = [0.0]
    for kind, shape in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", result):
        if kind in _BYTES:
            sizes.append(_BYTES[kind] * math.prod(int(size) for size in shape.split(",") if size))
    return max(sizes)
