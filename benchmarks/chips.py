"""Published figures of accelerators, dense bfloat16 and one direction of the links."""

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
