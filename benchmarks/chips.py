"""Published peak figures of accelerators: dense bfloat16, and links in one direction."""

import re
from typing import NamedTuple


class Chip(NamedTuple):
    """One chip.

    Attributes:
        flops: peak FLOP/s of dense bfloat16 matrix products.
        memory: bytes.
        bandwidth: of the memory, bytes/s.
        link: bytes/s to other chips in one direction, all links together.
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


def chip_of(device_kind: str) -> Chip | None:
    """Returns the figures of a GPU by the name that it reports; None where they are unknown.

    The figures are those of SXM modules. The same chip on another board, or a partition of one, has others.
    """
    parts = set(re.split(r"[\s-]+", device_kind.lower()))
    if parts & {"pcie", "nvl", "mig"}:
        return None
    return next((CHIPS[name] for name in ("h100", "h200") if name in parts), None)
