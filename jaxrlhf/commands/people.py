"""The labelling page as commands set it up: where it is served, and to how many people a pair is shown."""

import dataclasses
from typing import ClassVar

from jaxrlhf.commands.options import Groups
from jaxrlhf.labelling.page import PORT


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageConfig:
    """Settings of the labelling page."""

    GROUPS: ClassVar[Groups] = {"the page": ("host", "port", "people_per_pair", "repeats")}

    host: str = "127.0.0.1"
    """Address that the page listens on. Any other than 127.0.0.1 lets other machines in, without encryption."""
    port: int = PORT
    """Port of the page; 0 takes any that is free."""
    people_per_pair: int = 1
    """Number of people who label each pair; the majority counts."""
    repeats: float = 0.05
    """Fraction of a person's pairs that are shown a second time, to measure how far their labels agree."""


PAGE_SETTINGS = ("host", "port", "people_per_pair", "repeats")


def check_page(config: PageConfig) -> None:
    """Raises ValueError for settings that are out of range."""
    if not 0 <= config.port < 65536:
        raise ValueError(f"--port must lie in [0, 65536), got {config.port}.")
    if config.people_per_pair < 1:
        raise ValueError(f"--people-per-pair must be at least 1, got {config.people_per_pair}.")
    if not 0 <= config.repeats < 1:
        raise ValueError(f"--repeats must lie in [0, 1), got {config.repeats:g}.")
