"""Published figures of accelerators, dense bfloat16 and one direction of the links."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    Attributes:
        flops: a second, of dense products in bfloat16.
        memory: bytes.
        bandwidth: of the memory, bytes a second.
        link: to other chips, bytes a second and direction, all links together.
        source: of the figures.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float
    source: str


CHIPS = {
    "v5e": Chip(197e12, 16e9, 819e9, 200e9, "cloud.google.com/tpu/docs/v5e"),
    "v5p": Chip(459e12, 95e9, 2765e9, 600e9, "cloud.google.com/tpu/docs/v5p"),
    "v6e": Chip(918e12, 32e9, 1638e9, 400e9, "cloud.google.com/tpu/docs/v6e"),
    "h100": Chip(989e12, 80e9, 3350e9, 450e9, "NVIDIA H100 SXM data sheet"),
    "h200": Chip(989e12, 141e9, 4800e9, 450e9, "NVIDIA H200 data sheet"),
}


def chip_of(kind: str) -> Chip | None:
    """Returns the figures of a graphics card by the name that it gives itself; None where they are not known.

    Those here are of SXM modules: the same chip on another board, or a part of one, has others.
    """
    words = set(re.split(r"[\s-]+", kind.lower()))
    if words & {"pcie", "nvl", "mig"}:
        return None
    return next((CHIPS[name] for name in ("h100", "h200") if name in words), None)
