"""What the page shows beside the pair: what the machine does, and how the policy stands."""

import threading
from typing import Any

POINTS = 200
"""Most points of a curve."""


class Board:
    """Shared by the thread that works and those that serve.

    Attributes:
        title: of the page.
        doing: what the machine does now, in words.
        ended: whether no more pairs will come.
    """

    def __init__(self, title: str, doing: str = ""):
        """Starts empty."""
        self.title, self.doing, self.ended = title, doing, False
        self._lock = threading.Lock()
        self._rows: dict[int, dict[str, float]] = {}
        self._facts: dict[str, str] = {}

    def measured(self, step: int, **values: float) -> None:
        """Adds a step's measurements; those of the same step are joined.

        Args:
            step: of the run.
            values: `win_rate` by people's labels, `reward_win_rate` by the reward model, `kl`.
        """
        with self._lock:
            self._rows.setdefault(step, {"step": step}).update(values)

    def set_facts(self, **facts: str) -> None:
        """Sets lines such as `beta="0.2"`."""
        with self._lock:
            self._facts |= facts

    def shown(self) -> dict[str, Any]:
        """Returns everything as JSON's types, with at most `POINTS` steps."""
        with self._lock:
            rows = [dict(self._rows[step]) for step in sorted(self._rows)]
            rows = rows[:: -(-(-len(rows) // POINTS) or 1)][::-1]
            facts = dict(self._facts)
        return {"title": self.title, "doing": self.doing, "ended": self.ended, "curve": rows, "facts": facts}
